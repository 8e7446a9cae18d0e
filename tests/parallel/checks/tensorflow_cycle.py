"""Packets and Horovod's cycle; see test_cycle.py, whose job has a cycle of a second."""

from __future__ import annotations

import time
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from hvd_syncbn.keras import SyncBatchNormalization

STEPS = 10


def check_layers_do_not_wait_for_the_cycle() -> float:
    """Seconds that STEPS steps of a layer took, in a graph, two packets each, after one that made the ranks agree on them."""
    layer = SyncBatchNormalization(name="cycle")
    x = tf.random.normal((2, 3, 3, 4))

    @tf.function
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return tape.gradient(y, x)

    step(x).numpy()
    start = time.monotonic()
    for _ in range(STEPS):
        step(x).numpy()
    return time.monotonic() - start


def check_parallel_layers_do_not_wait_for_the_cycle() -> float:
    """Seconds that 4 * STEPS steps of parallel layers took, whose packets two threads send at the same time."""
    layers = [SyncBatchNormalization(name=f"branch_{number}") for number in range(8)]
    # Branches of different lengths, and not the same on each rank.
    weights = [tf.random.normal((64, 64 * (1 + number * (1 + hvd.rank()) % 5))) / 100 for number in range(8)]
    x = tf.random.normal((256, 64))

    @tf.function
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            branches = zip(layers, weights, strict=True)
            y = tf.add_n([layer(x @ w @ tf.transpose(w), training=True) for layer, w in branches])
        return tape.gradient(y, x)

    step(x).numpy()
    start = time.monotonic()
    for _ in range(4 * STEPS):
        step(x).numpy()
    return time.monotonic() - start


def check_waiting_threads_do_not_wait_for_the_cycle() -> float:
    """Seconds that STEPS of each collective took, in eager operations, whose thread waits for them (patch 0041)."""
    start = time.monotonic()
    for _ in range(STEPS):
        assert hvd.allreduce(tf.ones(3), name="sum", op=hvd.Sum).numpy().tolist() == [hvd.size()] * 3
        assert hvd.broadcast(tf.constant([hvd.rank()]), 1, name="copy").numpy().tolist() == [1]
        assert hvd.allgather(tf.constant([hvd.rank()]), name="all").numpy().tolist() == list(range(hvd.size()))
    return time.monotonic() - start
