"""Ranks of a TensorFlow job that need different gradients: the right ones on every rank, or an error; see test_gradients.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_syncbn import vectors
from hvd_syncbn.tensorflow import sync_batch_norm
from tests import tensorflow_second as second
from tests.tensorflow_tools import assert_same_bits, in_graph

RANK, SIZE = hvd.rank(), hvd.size()
ALONE = [hvd.add_process_set([rank]) for rank in range(SIZE)][RANK]
FIRST = RANK == 0
MINE = slice(3 * RANK, 3 * RANK + 3)
HOW: dict[str, Callable[[Any], Any]] = {"eager": lambda function: function, "graph": in_graph}


def batch(seed: int) -> np.ndarray:
    """Of all ranks."""
    return np.random.default_rng(seed).standard_normal((3 * SIZE, 4, 5)).astype(np.float32)


def layer(x: Any, gamma: Any, name: str, process_set: Any = None, **options: Any) -> Any:
    zeros, ones = tf.zeros(5), tf.ones(5)
    return sync_batch_norm(x, gamma, zeros, zeros, ones, training=True, name=name, process_set=process_set, **options)[0]


def reference(seed: int, **options: Any) -> Any:
    """This rank's part of the gradient of the sum of squares."""
    x = tf.constant(batch(seed))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, tf.fill([5], 1.5), "alone", ALONE, **options)
        loss = tf.reduce_sum(y * y)
    return tape.gradient(loss, x)[MINE]


def check_watched_on_one_rank() -> None:
    """x on one rank, gamma on all: also where a graph has no use for what the collective brings."""
    for how, wrap in HOW.items():
        for relu in (None, "relu"):

            @wrap
            def run(x: Any, gamma: Any, how: str = how, relu: str | None = relu) -> Any:
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch([x, gamma] if FIRST else [gamma])
                    y = layer(x, gamma, f"watched.{how}.{relu}", activation=relu)
                    loss = tf.reduce_sum(y * y)
                return tape.gradient(loss, [x, gamma])

            dx, dgamma = run(tf.constant(batch(1)[MINE]), tf.fill([5], 1.5))
            assert (dx is not None) == FIRST and dgamma is not None
            if FIRST:
                assert_same_bits([dx], [reference(1, activation=relu)])


def check_gradients_of_some_tensors() -> None:
    """Both are watched; one rank asks for gamma's gradient alone, or stops x's."""
    for how, wrap in HOW.items():
        for stops in (False, True):

            @wrap
            def run(x: Any, gamma: Any, how: str = how, stops: bool = stops) -> Any:
                with tf.GradientTape() as tape:
                    tape.watch([x, gamma])
                    y = layer(tf.stop_gradient(x) if stops and not FIRST else x, gamma, f"some.{how}.{stops}")
                    loss = tf.reduce_sum(y * y)
                return tape.gradient(loss, [x, gamma] if FIRST else [gamma])

            got = run(tf.constant(batch(1)[MINE]), tf.fill([5], 1.5))
            if FIRST:
                assert_same_bits(got[:1], [reference(1)])


def check_persistent_tape() -> None:
    x, gamma = tf.constant(batch(1)[MINE]), tf.fill([5], 1.5)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, gamma])
        y = layer(x, gamma, "persistent")
        loss = tf.reduce_sum(y * y)
    for wanted in (x if FIRST else gamma, gamma, x):
        got = tape.gradient(loss, wanted)
        if wanted is x:
            assert_same_bits([got], [reference(1)])


def check_another_order_of_calls() -> None:
    """Of one layer in eager mode: told on every rank. A graph numbers the calls, and no order is wrong."""
    xs = [tf.constant(batch(seed)[MINE]) for seed in (1, 2)]
    gamma = tf.fill([5], 1.5)

    def run(order: tuple[int, int]) -> list[Any]:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(xs)
            losses = [tf.reduce_sum(layer(x, gamma, "block.twice") ** 2) for x in xs]
        gradients = {i: tape.gradient(losses[i], xs[i]) for i in order}
        return [gradients[0], gradients[1]]

    order = (0, 1) if FIRST else (1, 0)
    want = [reference(1), reference(2)]
    try:
        run(order)
    except ValueError as error:
        assert "different calls of layer 'block.twice'" in str(error) and "same order" in str(error), error
    else:
        raise AssertionError("no error")
    assert_same_bits(run((1, 0)), want)
    assert_same_bits(in_graph(lambda: run((0, 1)))(), want)


def check_losses_with_gradients_in_them() -> None:
    """Gradient penalty, forces and curvature; with an empty share, too."""
    for kind, wrap in (("uneven", HOW["eager"]), ("empty", HOW["graph"])):
        for loss in second.LOSSES:
            mine = vectors.split(SIZE, kind)[RANK]
            second.check(loss, mine, vectors.SAMPLES, lambda tensor: hvd.allreduce(tensor, op=hvd.Sum), wrap)
