"""Conversion of whole Keras models to ``SyncBatchNormalization`` and back.

The class of a layer is changed in place, so the layer object, its weights and all references to it are kept.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras

from hvd_syncbn.tf_impl.keras.layer import BatchNormalization, SyncBatchNormalization, held

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet


def convert_sync_batchnorm(model: keras.layers.Layer, process_set: ProcessSet | None = None) -> keras.layers.Layer:
    """Convert every `keras.layers.BatchNormalization` of a model to `SyncBatchNormalization`, in place.

    This includes layers in Sequential, functional, subclassed and nested models and in wrappers. Names, weights and `trainable`
    are kept, and a shared layer stays shared. Collectives are named by the name of `model` and the layers' paths in it, which
    do not depend on other objects that a rank has created. Give models that are converted separately different names
    (`keras.Sequential(..., name="generator")`). A `SyncBatchNormalization` gets the new process set and name. A subclass of
    `BatchNormalization` is left unchanged, with a warning.

    A compiled model stays compiled, and its next `fit()` traces it again. A user-defined `tf.function` keeps its traces.

    Args:
        model: Model or layer.
        process_set: Horovod process set whose ranks share the batch; `None` for all ranks.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a Keras 3 model or layer.

    Warns:
        UserWarning: There is nothing to convert. A model that creates layers in `build()` or `call()` must be built first.
    """
    layers = list(batch_norms(checked(model)))
    for path, layer in layers:
        if type(layer) in (keras.layers.BatchNormalization, BatchNormalization):
            synchronize(layer, _collective_name(model, layer, path), process_set)
        elif isinstance(layer, SyncBatchNormalization):
            layer.process_set = held(process_set)
            layer.collective_name = _collective_name(model, layer, path)
        else:
            _warn(path, layer)
    if not layers:
        _warn_of_nothing(model, "BatchNormalization")
    forget_traces(model)
    return model


def _collective_name(model: keras.layers.Layer, layer: keras.layers.Layer, path: str) -> str:
    """Return the model's name and the layer's path in it; for a layer that is converted directly, the layer's name.

    The name depends on the model alone, so it is the same on a rank that has created other models, has loaded this one from a
    file, or joins an elastic job. It does not contain the number of channels, so that ranks with different numbers exchange a
    packet under the same name and raise an error.
    """
    return path if layer is model else f"{_name(model, Counter())}.{path}"


def synchronize(
    layer: Any,
    collective_name: str,
    process_set: ProcessSet | Sequence[int] | None,
    activation: str | None = None,
    unbiased_variance: bool = False,
    zero_debias: bool = False,
    skip_nonfinite: bool = True,
) -> None:
    """Convert a Keras batch normalization to `SyncBatchNormalization`, in place."""
    change_class(layer, SyncBatchNormalization)
    layer.process_set = held(process_set)
    layer.collective_name = collective_name
    layer.activation = activation
    layer.unbiased_variance = unbiased_variance
    if zero_debias:
        layer.zero_debias = True
    if not skip_nonfinite:
        layer.skip_nonfinite = False
    layer.synchronized = False
    layer.supports_jit = False


def revert_sync_batchnorm(model: keras.layers.Layer) -> keras.layers.Layer:
    """Convert every `SyncBatchNormalization` of a model to `keras.layers.BatchNormalization`, in place.

    Evaluation and export do not need this, because `SyncBatchNormalization` then runs Keras's own code.

    Args:
        model: Model or layer.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a Keras 3 model or layer.
        ValueError: A layer has an activation or an unbiased average (`zero_debias`, `momentum=None`), which Keras's layer does
            not support. Nothing is changed in this case.

    Warns:
        UserWarning: There is nothing to convert.
    """
    layers = [(path, layer) for path, layer in batch_norms(checked(model)) if isinstance(layer, SyncBatchNormalization)]
    for path, layer in layers:
        if layer.activation is not None:
            raise ValueError(
                f"BatchNormalization has no activation. Received: layer {path!r} with activation={layer.activation!r}"
            )
        if layer.averages:
            raise ValueError(
                "BatchNormalization only supports averaging with a momentum. "
                f"Received: layer {path!r} with momentum={layer.momentum}, zero_debias={layer.zero_debias}"
            )
    for path, layer in layers:
        if type(layer) is not SyncBatchNormalization:
            _warn(path, layer)
            continue
        for name in ("activation", "unbiased_variance", "process_set", "collective_name"):
            delattr(layer, name)
        layer._total = None
        layer.__dict__.pop("skip_nonfinite", None)
        layer.supports_jit = True
        change_class(layer, BatchNormalization if layer.frozen else keras.layers.BatchNormalization)
    if not layers:
        _warn_of_nothing(model, "SyncBatchNormalization")
    forget_traces(model)
    return model


def checked(model: Any) -> keras.layers.Layer:
    """Return `model` if it is a model or layer of Keras 3; raise ``TypeError`` otherwise."""
    if not isinstance(model, keras.layers.Layer):
        kind = model if isinstance(model, type) else type(model)
        hint = " tf_keras (Keras 2) is not supported." if kind.__module__.partition(".")[0] == "tf_keras" else ""
        raise TypeError(
            f"`model` must be a single Keras 3 model or layer.{hint} Received: {model!r} "
            f"({'the class' if isinstance(model, type) else 'of type'} {kind.__module__}.{kind.__qualname__})"
        )
    return model


def _warn_of_nothing(model: keras.layers.Layer, what: str) -> None:
    warnings.warn(
        f"found no {what} to convert. A model that creates layers in `build()` or `call()` must be built first. "
        f"Received: {model!r}",
        stacklevel=3,
    )


def change_class(layer: Any, cls: type) -> None:
    """Change the class of a Keras object, in place."""
    # Bypass Keras's __setattr__, which would track the class as state.
    object.__setattr__(layer, "__class__", cls)


def _warn(path: str, layer: keras.layers.Layer) -> None:
    warnings.warn(
        f"layer {path!r} is left unchanged, because a subclass may do more than BatchNormalization. "
        f"Received: an instance of {type(layer).__qualname__}",
        stacklevel=3,
    )


def forget_traces(model: keras.layers.Layer, allow_xla: bool = False) -> None:
    """Make compiled models trace their next step again. Disable XLA, which cannot compile collectives, unless it is allowed."""
    for _, layer in _walk(model, "", set()):
        if isinstance(layer, keras.Model) and layer.compiled:
            layer.train_function = layer.test_function = layer.predict_function = None
            layer.jit_compile = allow_xla and layer.jit_compile


def batch_norms(model: keras.layers.Layer) -> Iterator[tuple[str, Any]]:
    """Yield the path and the layer of every batch normalization in a model, including subclasses."""
    for path, layer in _walk(model, "", set()):
        if isinstance(layer, keras.layers.BatchNormalization):
            yield path or layer.name, layer


def _walk(layer: keras.layers.Layer, path: str, seen: set[int]) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Yield a layer and all layers in it, each once, with its path of attribute names or, without these, Keras's names."""
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield path, layer
    attributes = dict(_attributes(layer))
    counts: Counter[str] = Counter()
    for child in layer._flatten_layers(include_self=False, recursive=False):
        name = attributes.get(id(child)) or _name(child, counts)
        yield from _walk(child, f"{path}.{name}" if path else name, seen)


def _attributes(layer: keras.layers.Layer) -> Iterator[tuple[int, str]]:
    for name, value in vars(layer).items():
        if not name.startswith("_"):
            yield from _members(name, value)


def _members(name: str, value: object) -> Iterator[tuple[int, str]]:
    if isinstance(value, keras.layers.Layer):
        yield id(value), name
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _members(f"{name}.{i}", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _members(f"{name}.{key}", item)


def _name(layer: keras.layers.Layer, counts: Counter[str]) -> str:
    """Return the layer's name. If Keras numbered it per process, number it among its siblings instead."""
    stem = re.sub(r"_\d+$", "", layer.name)
    if stem.replace("_", "") != type(layer).__name__.lower():
        return str(layer.name)
    counts[stem] += 1
    return stem if counts[stem] == 1 else f"{stem}_{counts[stem] - 1}"
