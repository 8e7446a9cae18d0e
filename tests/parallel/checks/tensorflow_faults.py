"""Faults that a job in Keras lives through, as in checks/torch_faults.py: the results are those of a job without them.

Two ranks; see test_faults.py. The timeline, which this job is to write, has no space: /dev/full.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

from hvd_syncbn.keras import convert_sync_batchnorm
from hvd_syncbn.tf_impl.horovod import Group
from tests.tensorflow_tools import assert_same_bits, in_graph

ROWS = slice(3 * hvd.rank(), 3 * hvd.rank() + 3)
X, DY = (np.random.default_rng(seed).standard_normal((6, 4)).astype(np.float32) for seed in (1, 2))


class Training:
    """Two layers, in eager code or in a graph of its own; `step` gives everything, from the same weights every time."""

    def __init__(self, how: Callable[[Any], Any], between: Callable[[], None] = lambda: None) -> None:
        first, second = (keras.layers.BatchNormalization(name=name) for name in ("first", "second"))
        self.model = convert_sync_batchnorm(keras.Sequential([keras.Input((4,)), first, keras.layers.ReLU(), second]))
        rng = np.random.default_rng(3)
        self.weights = [np.abs(rng.standard_normal(w.shape)) + 0.5 for w in self.model.get_weights()]
        self.between = between
        self.function = how(self._step)

    def step(self) -> list[Any]:
        self.model.set_weights(self.weights)
        return [*self.function(), *self.model.get_weights()]

    def _step(self) -> list[Any]:
        x = tf.constant(X[ROWS])
        first, relu, second = self.model.layers
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = first(x, training=True)
            with tf.control_dependencies([tf.py_function(lambda _: self.between(), [y], [])]):
                y = tf.identity(y)
            y = second(relu(y), training=True)
        variables = [weight.value for weight in self.model.trainable_weights]
        return [y, *tape.gradient(y, [x, *variables], output_gradients=tf.constant(DY[ROWS]))]


HOW: tuple[Callable[[Any], Any], ...] = (lambda function: function, in_graph)


def check_no_space_for_the_timeline() -> None:
    """The first: from now on, whatever is written fails."""
    for _ in range(20):
        assert hvd.allreduce(tf.ones(1), op=hvd.Sum).numpy() == [2.0]
    time.sleep(1)  # the timeline's writer has seen it


def check_a_slow_rank() -> dict[str, Any]:
    """Others wait for it for longer than the stall check does, and get a warning, not an error."""
    want = Training(in_graph).step()
    start = time.monotonic()
    assert_same_bits(Training(in_graph, lambda: time.sleep(4 if hvd.rank() == 1 else 0)).step(), want)
    return {"seconds": time.monotonic() - start}


def check_an_allreduce_fails_and_is_retried() -> None:
    """On one rank, before it sends anything: no statistics are touched, and a second try gives what the first would have."""
    real = Group.sum
    for how in HOW:
        want = Training(how).step()
        calls: list[str] = []

        def failing(group: Group, packet: Any, name: str, calls: list[str] = calls) -> Any:
            def fail(packet: Any) -> Any:
                calls.append(name)
                if hvd.rank() == 1 and len(calls) == 1:
                    raise HorovodInternalError("the network is down")
                return packet

            shape = packet.shape
            packet = tf.py_function(fail, [packet], packet.dtype)
            packet.set_shape(shape)
            return real(group, packet, name)

        with mock.patch.object(Group, "sum", failing):
            training = Training(how)
            if hvd.rank() == 1:
                before = [weight.numpy() for weight in training.model.weights]
                training.weights = before
                try:
                    training.step()
                except (HorovodInternalError, tf.errors.UnknownError) as error:
                    assert "the network is down" in str(error)
                else:
                    raise AssertionError("no error")
                assert_same_bits(training.model.get_weights(), before)
                training.weights = Training(how).weights
            assert_same_bits(training.step(), want)
        assert len(calls) == (5 if hvd.rank() == 1 else 4), calls


def check_start_again() -> None:
    """hvd.shutdown() and hvd.init(), as after an error that all ranks have had; with the same graph, too."""
    trainings = [Training(how) for how in HOW]
    want = [training.step() for training in trainings]
    hvd.shutdown()
    hvd.init()
    for training, results in zip(trainings, want, strict=True):
        assert_same_bits(training.step(), results)
