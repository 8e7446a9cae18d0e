"""`take_part`: a rank without input for a layer takes part in the layer's collectives."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras

from hvd_syncbn import native
from hvd_syncbn.tf_impl.keras.convert import batch_norms, checked
from hvd_syncbn.tf_impl.keras.layer import SyncBatchNormalization

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from hvd_syncbn.tf_impl import horovod


def take_part(*layers: keras.layers.Layer) -> Any:
    """Take part in a step of synchronized layers with an empty batch, in place of calling them with `training=True`.

    A rank that has no input for a part of the network (a detection head without proposals, a graph without edges) calls it
    where other ranks call the layer; otherwise they wait for this rank. The results on the other ranks are those of their
    samples alone. Moving statistics are updated here, too, so that all ranks keep the same ones. The result is 0: add it to
    the loss, so that this rank takes part in the backward pass. Call it at the same place of the step.

    It works in eager code and in a `tf.function`, also in one branch of a `tf.cond` (or of an `if` that AutoGraph converts)
    whose other branch calls the layer. Frozen layers and those that are not trainable have no collectives and are left out. No
    other code of the layer runs. Under a `tf.distribute` strategy collectives have an order, and layers take part in the order
    in which Keras lists them; the condition must be a Python one there, because replicas cannot exchange in a `tf.cond`.

    Args:
        layers: Models or layers, built, with `SyncBatchNormalization` layers in them, or such layers, in the order in which
            other ranks run them; each as often as they run it.

    Returns:
        A scalar 0, float32. Its gradient by every trainable variable of `layers` is 0, so optimizers that average gradients
        find one of each variable on every rank.

    Raises:
        TypeError: An argument is not a Keras 3 layer.
        ValueError: A layer is not built, or nothing is trainable, so that no gradient would reach it; the ranks
            disagree about a layer, or their global batch holds one value per channel.
        RuntimeError: Horovod is missing or not initialized; Keras's backend is not TensorFlow.

    Warns:
        UserWarning: There is no `SyncBatchNormalization` in an argument.

    Example:

    >>> import horovod.tensorflow as hvd, tensorflow as tf
    >>> from hvd_syncbn.keras import SyncBatchNormalization, take_part
    >>> hvd.init()
    >>> head = SyncBatchNormalization()
    >>> head.build((None, 4))
    >>> boxes = tf.zeros((0, 4))
    >>> with tf.GradientTape() as tape:
    ...     loss = tf.reduce_sum(head(boxes, training=True) ** 2) if len(boxes) else take_part(head)
    >>> [gradient.shape.as_list() for gradient in tape.gradient(loss, [v.value for v in head.trainable_variables])]
    [[4], [4]]
    """
    calls = [_norms(layer) for layer in layers]
    variables = {id(variable): variable for layer in layers for variable in layer.trainable_variables}.values()
    if not variables:
        raise ValueError(
            "no variable of the layers is trainable, so no gradient would reach them: call them with an empty batch instead. "
            f"Received: {layers!r}"
        )
    for norms in calls:
        for norm, packet in zip(norms, _sum(norms, "forward"), strict=True):
            norm._take_statistics(packet)

    @tf.custom_gradient
    def zero(*values: Any) -> Any:
        def gradient(dy: Any) -> Any:
            for norms in reversed(calls):
                _sum(norms[::-1], "backward")
            return [tf.zeros_like(value) for value in values]

        return tf.zeros([]), gradient

    return zero(*(tf.convert_to_tensor(variable) for variable in variables))


def _norms(layer: keras.layers.Layer) -> list[SyncBatchNormalization]:
    """Return the layers in a layer that have collectives in training."""
    found = [(path, norm) for path, norm in batch_norms(checked(layer)) if isinstance(norm, SyncBatchNormalization)]
    if not found:
        warnings.warn(f"found no SyncBatchNormalization that could take part. Received: {layer!r}", stacklevel=3)
    for path, norm in found:
        if not norm.built:
            raise ValueError(f"the layer is not built: call it on a batch first. Received: layer {path!r} without weights")
    return [norm for _, norm in found if norm.trainable and not norm.frozen]


def _sum(norms: Sequence[SyncBatchNormalization], direction: str) -> list[Any]:
    """Return the layers' packets, summed over the ranks. Over Horovod all sums start before the first one is awaited."""
    packets = [_zeros(native.packet_size(norm.moving_mean.shape[0])) for norm in norms]
    names = [f"{norm.collective_name}.{direction}" for norm in norms]
    groups = [norm._group() for norm in norms]
    of_horovod = [group for group in groups if isinstance(group, horovod.Group)]
    if tf.executing_eagerly() and len(of_horovod) == len(groups):
        return horovod.sum_together(of_horovod, packets, names, waits=direction == "forward")
    return [group.sum(packet, name) for group, packet, name in zip(groups, packets, names, strict=True)]


def _zeros(size: int) -> Any:
    """Return the packet of a rank that has joined. TensorFlow would run Horovod's op when it optimizes a graph of constants."""
    low, high = tf.constant(0, tf.int64), tf.constant(1, tf.int64)
    return tf.raw_ops.RandomUniformInt(shape=[size], minval=low, maxval=high, seed=1, seed2=1)
