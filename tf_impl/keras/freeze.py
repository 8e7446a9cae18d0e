"""``freeze_batchnorm`` and ``unfreeze_batchnorm``: training with fixed moving statistics."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from hvd_syncbn.tf_impl.keras.convert import batch_norms, change_class, checked, forget_traces
from hvd_syncbn.tf_impl.keras.layer import BatchNormalization, SyncBatchNormalization


def freeze_batchnorm(model: keras.layers.Layer, affine: bool = False) -> keras.layers.Layer:
    """Make every batch normalization of a model use its moving statistics in training and stop updating them.

    Caffe calls this `use_global_stats`. It is common for fine-tuning with small batches. Frozen layers send no collective, so
    freeze them on every rank. They stay frozen when `trainable` of an enclosing model is set, after `convert_sync_batchnorm`
    and `revert_sync_batchnorm`, and after saving and loading. The class of a `keras.layers.BatchNormalization` changes in place
    to a subclass that supports freezing. Other subclasses are left unchanged, with a warning.

    A compiled model stays compiled, and its next `fit()` traces it again. A user-defined `tf.function` keeps its traces.

    Args:
        model: Model or layer.
        affine: Whether `gamma` and `beta` are still trained. Otherwise they are not trainable and have no gradient.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a Keras layer, or `affine` is not a bool.

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
        raise TypeError(f"`affine` must be a bool. Received: affine={affine!r}")
    layers = _batch_norms(model)
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
    """Undo `freeze_batchnorm`: `training` and `trainable` have their usual effect again.

    `gamma` and `beta` are trainable again if they were before.

    Args:
        model: Model or layer. Layers that are not frozen are left unchanged.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a Keras layer.
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
        warnings.warn(
            "found no batch normalization. A model that creates layers in `build()` or `call()` must be built first. "
            f"Received: {model.name!r}",
            stacklevel=3,
        )
    return norms
