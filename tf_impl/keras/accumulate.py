"""`accumulate_statistics`: moving statistics over several micro-batches together."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from hvd_syncbn import native
from hvd_syncbn.tf_impl.keras.convert import batch_norms, checked, forget_traces
from hvd_syncbn.tf_impl.keras.layer import SyncBatchNormalization

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf


def accumulate_statistics(model: keras.layers.Layer, batches: int) -> keras.layers.Layer:
    """Make each synchronized layer update its moving statistics once in `batches` training steps, by all of them together.

    For gradient accumulation: with `batches` micro-batches per optimizer step (`backward_passes_per_step`,
    `gradient_accumulation_steps`) the moving statistics of a layer have the same bytes as if its inputs had come in one batch,
    and momentum means what it means without accumulation. Each micro-batch is still normalized by its own statistics (of all
    ranks).

    A layer counts its own training steps, so a layer that runs several times per micro-batch completes an update sooner.
    Calling this function discards the micro-batches since a layer's last update, and files do not contain them. In an elastic
    job call it after every reset, on every rank. A compiled model stays compiled, and its next `fit()` traces it again. A
    user-defined `tf.function` keeps its traces: call this function before the first trace, and under a `tf.distribute`
    strategy in its scope.

    Args:
        model: Model or layer, built. Each `SyncBatchNormalization` in it takes part.
        batches: The number of micro-batches per update, the same on every rank; 1 updates in every step again. Times the
            number of ranks it may be up to `2 ** 22`.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a Keras 3 layer, or `batches` is not an int.
        ValueError: `batches` is less than 1, or a layer is not built.

    Warns:
        UserWarning: There is no `SyncBatchNormalization` in `model`.

    Example:

    >>> import horovod.tensorflow as hvd, numpy as np
    >>> from hvd_syncbn.keras import SyncBatchNormalization, accumulate_statistics
    >>> hvd.init()
    >>> layer = SyncBatchNormalization(momentum=0.0)
    >>> layer.build((None, 1))
    >>> layer = accumulate_statistics(layer, 2)
    >>> for micro_batch in np.array([[[1.0], [2.0]], [[3.0], [6.0]]], "float32"):
    ...     y = layer(micro_batch, training=True)
    >>> layer.moving_mean.numpy()
    array([3.], dtype=float32)
    """
    if not isinstance(batches, int) or isinstance(batches, bool):
        raise TypeError(f"expected an int for `batches`. Received: {batches!r}")
    if batches < 1:
        raise ValueError(f"expected at least 1 micro-batch per update. Received: batches={batches}")
    norms = [(path, norm) for path, norm in batch_norms(checked(model)) if isinstance(norm, SyncBatchNormalization)]
    if not norms:
        warnings.warn(f"found no SyncBatchNormalization. Received: {model!r}", stacklevel=2)
    for path, norm in norms:
        if not norm.built:
            raise ValueError(f"the model is not built: call it on a batch first. Received: layer {path!r} without weights")
    for _, norm in norms:
        norm._total = Total(norm.moving_mean.shape[0], batches) if batches > 1 else None
    forget_traces(model)
    return model


class Total:
    """The sum of a layer's packets since its last update, as variables that no file contains."""

    def __init__(self, channels: int, batches: int) -> None:
        """Start with zeros, for an update after this number of batches."""
        size = native.packet_size(channels)
        # In replicas of a strategy all have the same values.
        first = {"trainable": False, "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA}
        self.packets = tf.Variable(tf.zeros(size, tf.int64), name="total", **first)
        self.counted = tf.Variable(0, dtype=tf.int64, name="batches_in_total", **first)
        self.batches = batches
        # Micro-batches with and without gradients differ in the digest.
        self.without_digest = np.ones(size, np.int64)
        self.without_digest[native.DIGEST] = 0

    def count_batch(self) -> tuple[Any, Any]:
        """Return the packet to update by and 1 after the last batch of an update; before, those of an empty batch and 0."""
        counted = self.counted + 1
        is_complete = tf.cast(tf.equal(counted, self.batches), tf.int64)
        packet = self.packets * is_complete
        with tf.control_dependencies([packet]):
            self.counted.assign(counted * (1 - is_complete))
            self.packets.assign(self.packets * (1 - is_complete))
        return packet * self.without_digest, is_complete
