"""``load_model``: load a Keras model ready to train on several ranks.

When Keras loads or clones a custom class, the class creates its layers again, as plain ones. Therefore the settings of
synchronized and frozen layers are stored next to the weights (`BatchNormalization.save_own_variables`). They are read here in a
second `load_weights`, during which the plain layers have the class `_Reader`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras

from hvd_syncbn.tf_impl.keras.convert import batch_norms, change_class, forget_traces, synchronize
from hvd_syncbn.tf_impl.keras.layer import RECORD, BatchNormalization
from hvd_syncbn.tf_impl.keras.training.optimizer import DistributedOptimizer, optimizers_of

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet


def load_model(
    filepath: str | os.PathLike[str],
    custom_objects: dict[str, Any] | None = None,
    compile: bool = True,
    safe_mode: bool = True,
    *,
    custom_optimizers: list[type[keras.optimizers.Optimizer]] | None = None,
    name: str | None = None,
    process_set: ProcessSet | None = None,
    backward_passes_per_step: int = 1,
    compression: Any = None,
    sparse_as_dense: bool = False,
) -> keras.Model:
    """Load a model as `keras.models.load_model` does, restore its synchronized layers and make its optimizers distributed.

    Synchronized layers of a custom class, which `keras.models.load_model` returns as plain layers, are synchronized again with
    their process sets (by their ranks) and collective names, and frozen layers are frozen again. All optimizers of the model,
    in `model.optimizer` or other attributes, are wrapped by `DistributedOptimizer` and keep their state, whether or not they
    were distributed when the model was saved.

    Args:
        filepath: A `.keras` file, the folder of `save(..., zipped=False)`, or a legacy `.h5` file. A legacy file does not
            record which layers inside custom classes were synchronized: a warning names the layers that may have been.
        custom_objects: Mapping of names to classes and functions, as in Keras.
        compile: Whether to compile the model, if it was compiled when saved, and wrap its optimizers.
        safe_mode: As in Keras.
        custom_optimizers: User-defined optimizer classes, as in Horovod.
        name: See `DistributedOptimizer`, also for the following arguments.
        process_set: The `hvd.ProcessSet` that the optimizer averages over.
        backward_passes_per_step: The number of batches per update.
        compression: A member of `hvd.Compression`.
        sparse_as_dense: Whether sparse gradients become dense.

    Returns:
        The model.

    Raises:
        TypeError: `filepath` is not a path.
        ValueError: As in `keras.models.load_model`.
        RuntimeError: The model is compiled, and Horovod is missing or not initialized, or Keras's backend is not TensorFlow.

    Warns:
        UserWarning: The model has plain layers that may have been synchronized, but the file does not record it.

    Example:

    ```python
    hvd.init()
    model = load_model("checkpoint.keras")
    model.fit(x, y, initial_epoch=5, callbacks=[BroadcastVariablesCallback()])
    ```
    """
    if not isinstance(filepath, str | os.PathLike):
        raise TypeError(f"`filepath` must be a path. Received: {filepath!r}")
    objects = {cls.__name__: cls for cls in custom_optimizers or []} | (custom_objects or {})
    model = keras.models.load_model(filepath, custom_objects=objects, compile=compile, safe_mode=safe_mode)
    plain = [(path, norm) for path, norm in batch_norms(model) if type(norm) is keras.layers.BatchNormalization]
    if plain and str(filepath).endswith((".h5", ".hdf5")):
        _warn_of_no_record(filepath, plain)
    elif plain and model.built:
        _restore(model, filepath, [norm for _, norm in plain])
    for optimizer in optimizers_of(model) if compile else ():
        DistributedOptimizer(
            optimizer,
            name,
            process_set=process_set,
            backward_passes_per_step=backward_passes_per_step,
            compression=compression,
            sparse_as_dense=sparse_as_dense,
        )
    return model


class _Reader(keras.layers.BatchNormalization):
    """A plain layer that also loads the record next to its weights."""

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(store)
        attributes = getattr(getattr(store, "_h5_entry_group", None), "attrs", {})
        object.__setattr__(self, "record", attributes.get(RECORD))


_Reader.__name__ = keras.layers.BatchNormalization.__name__  # the name that Keras looks for in the file


def _restore(model: keras.Model, filepath: str | os.PathLike[str], norms: list[Any]) -> None:
    weights = Path(filepath, "model.weights.h5") if os.path.isdir(filepath) else filepath
    for norm in norms:
        change_class(norm, _Reader)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `load_model` has issued these warnings
            model.load_weights(weights)
    finally:
        for norm in norms:
            change_class(norm, keras.layers.BatchNormalization)
    for norm in norms:
        record = vars(norm).pop("record", None)
        if record is not None:
            settings = json.loads(record)
            frozen = settings.pop("frozen")
            if settings:
                synchronize(norm, **settings)
            else:
                change_class(norm, BatchNormalization)
            if frozen:
                norm.freeze(affine=frozen == "statistics")
    forget_traces(model)


def _warn_of_no_record(filepath: str | os.PathLike[str], plain: list[tuple[str, Any]]) -> None:
    """Warn about plain layers that the file's config does not contain, because a custom class created them."""
    import h5py  # type: ignore[import-untyped]

    with h5py.File(filepath, "r") as file:
        config = json.loads(file.attrs["model_config"])
    told = set(_names(config))
    paths = [path for path, norm in plain if norm.name not in told]
    if paths:
        warnings.warn(
            f"a legacy .h5 file does not record whether layers inside custom classes were synchronized. "
            f"{paths} are plain now: if they were synchronized, call `convert_sync_batchnorm` again, and save the model as "
            f".keras. Received: filepath={str(filepath)!r}",
            stacklevel=3,
        )


def _names(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        if isinstance(config.get("name"), str):
            yield config["name"]
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from _names(value)
