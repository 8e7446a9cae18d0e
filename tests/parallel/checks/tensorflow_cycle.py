"""Packets and Horovod's cycle; see test_cycle.py, whose job has a cycle of a second."""

from __future__ import annotations

import time
from typing import Any

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
