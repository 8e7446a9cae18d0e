"""What test_tensorflow_xla.py runs with and without auto-clustering."""

from __future__ import annotations

import hashlib
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_syncbn.tf_impl import functional
from tests.arrays import same_bits
from tests.tensorflow_tools import step


def check_step() -> str:
    """sha256 of the results of two layers in a graph, between operations that are exact in whatever way they are compiled."""
    whole = step((8, 6, 4))
    mine = whole.part(slice(hvd.rank(), None, hvd.size()))

    @tf.function
    def run(x: Any, dy: Any, residual: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, mean, variance = functional.sync_batch_norm(tf.abs(x * 2) * 4, *whole.state, training=True, name="one")
            y = tf.nn.relu(-y * 0.5) * 2
            y, *_ = functional.sync_batch_norm(
                y, *whole.state, training=True, name="two", residual=residual * 2, activation="relu"
            )
            y = tf.maximum(y * 4, 0.5) * 2
        return y, tape.gradient(y, x, output_gradients=dy), mean, variance

    y, dx, mean, variance = run(mine.x, mine.dy, mine.residual)
    found = hashlib.sha256()
    for tensor in (y, dx):
        parts = hvd.allgather_object(tensor.numpy())
        joined = np.empty_like(whole.x)
        for rank, part in enumerate(parts):
            joined[rank :: hvd.size()] = part
        found.update(joined.tobytes())
    for tensor in (mean, variance):
        assert all(same_bits(tensor, other) for other in hvd.allgather_object(tensor.numpy()))
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()
