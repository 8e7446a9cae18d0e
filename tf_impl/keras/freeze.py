"""``freeze_batchnorm`` and its opposite: batch normalizations that use and keep their moving statistics in training, too."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from hvd_syncbn.tf_impl.keras.convert import batch_norms, change_class, checked, forget_traces
from hvd_syncbn.tf_impl.keras.layer import BatchNormalization, SyncBatchNormalization, renormalizes


def freeze_batchnorm(model: keras.layers.Layer, affine: bool = False) -> keras.layers.Layer:
    """Make every batch normalization of a model use its moving statistics in training, too, and leave them as they are.

    That is what Caffe calls `use_global_stats`, and what fine-tuning with small batches wants. Frozen layers send no
    collective: freeze them on every rank. They stay frozen when `trainable` of a model above is set, through
    `convert_sync_batchnorm` and `revert_sync_batchnorm`, saving and loading. A `keras.layers.BatchNormalization` becomes one
    that knows about it, in place; a class derived from it is left as it is, with a warning.

    A compiled model stays compiled, and its next `fit()` traces anew. A `tf.function` of your own keeps what it has traced.

    Args:
        model: Model or layer.
        affine: Whether `gamma` and `beta` go on learning. Otherwise they are no trainable variables and have no gradient.

    Returns:
        `model`.

    Raises:
        TypeError: Not a Keras layer; `affine` is no bool.
        ValueError: A layer does batch renormalization. Nothing is changed then.

    Example:

    >>> import keras
    >>> from hvd_syncbn.keras import freeze_batchnorm, unfreeze_batchnorm
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()])
    >>> model = freeze_batchnorm(model)
    >>> model.trainable = True
    >>> [variable.name for variable in model.trainable_variables]
    ['kernel', 'bias']
    >>> len(unfreeze_batchnorm(model).trainable_variables)
    4
    """
    if not isinstance(affine, bool):
        raise TypeError(f"`affine` has to be a bool. Received: affine={affine!r}")
    layers = _batch_norms(model)
    for path, layer in layers:
        if renormalizes(layer):
            raise ValueError(
                f"A layer that does batch renormalization cannot be frozen. Received: layer {path!r} with renorm=True"
            )
    known = []
    for path, layer in layers:
        if type(layer) is keras.layers.BatchNormalization:
            change_class(layer, BatchNormalization)
        if type(layer) in (BatchNormalization, SyncBatchNormalization):
            known.append(layer)
        else:
            warnings.warn(
                f"layer {path!r} is left unchanged: only BatchNormalization and SyncBatchNormalization can be frozen. "
                f"Received: an instance of {type(layer).__name__}",
                stacklevel=2,
            )
    for layer in known:
        if layer.frozen:
            layer.unfreeze()
        layer.freeze(affine)
    forget_traces(model, allow_xla=True)
    return model


def unfreeze_batchnorm(model: keras.layers.Layer) -> keras.layers.Layer:
    """Undo `freeze_batchnorm`: layers train again as `training` and `trainable` say, and their weights as they did before.

    Args:
        model: Model or layer. Layers that are not frozen stay as they are.

    Returns:
        `model`.

    Raises:
        TypeError: Not a Keras layer.
    """
    for _, layer in _batch_norms(model):
        if not getattr(layer, "frozen", None):
            continue
        layer.unfreeze()
        if type(layer) is BatchNormalization:
            change_class(layer, keras.layers.BatchNormalization)
    forget_traces(model, allow_xla=True)
    return model


def _batch_norms(model: keras.layers.Layer) -> list[tuple[str, Any]]:
    norms = list(batch_norms(checked(model)))
    if not norms:
        warnings.warn(f"found no batch normalization. Received: {model.name!r}", stacklevel=3)
    return norms
