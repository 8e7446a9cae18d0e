"""What is looked at when training starts: the mistakes of a job that nobody else would speak of.

A synchronized layer looks when it is first called to train, from the model that was called, and
`BroadcastVariablesCallback` when `fit()` begins.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import keras

from hvd_syncbn.tf_impl.keras.convert import batch_norms
from hvd_syncbn.tf_impl.keras.layer import SyncBatchNormalization
from hvd_syncbn.tf_impl.keras.optimizer import is_distributed

_looked: WeakKeyDictionary[keras.layers.Layer, int | None] = WeakKeyDictionary()


def look(model: keras.layers.Layer) -> None:
    """Warn, once for a model and its optimizer, of what trains on each rank alone.

    Args:
        model: What is about to be trained on several ranks.

    Warns:
        UserWarning: The model has synchronized layers and others that are not, or is trained by `fit()` or `train_on_batch()`
            with an optimizer that does not average. Loops of one's own, and a `train_step` of one's own, may average by
            themselves (`hvd.DistributedGradientTape`): nothing is said of those.
    """
    optimizer = _optimizer(model)
    if model in _looked and _looked[model] == (optimizer and id(optimizer)):
        return
    _looked[model] = optimizer and id(optimizer)
    if optimizer is not None and not is_distributed(optimizer):
        warnings.warn(
            f"model {model.name!r} trains on several ranks with an optimizer that does not average: each rank applies its own "
            "gradients, and the weights go apart. Compile with `hvd_syncbn.keras.DistributedOptimizer(optimizer)`, or load "
            f"with `hvd_syncbn.keras.load_model`. Received: optimizer={optimizer!r}",
            stacklevel=2,
        )
    norms = list(batch_norms(model))
    plain = [path for path, norm in norms if not isinstance(norm, SyncBatchNormalization) and _uses_the_batch(norm)]
    if plain and len(plain) < len(norms):
        warnings.warn(
            f"model {model.name!r} trains on several ranks with batch normalizations that are synchronized and others that "
            "take the statistics of their rank. A custom class makes plain layers when Keras loads or clones it: use "
            "`hvd_syncbn.keras.load_model`, or `convert_sync_batchnorm(model)` again; or freeze them (`trainable = False`). "
            f"Received: plain layers {plain}",
            stacklevel=2,
        )


def _uses_the_batch(norm: Any) -> bool:
    return norm.trainable and not getattr(norm, "frozen", None)


def _optimizer(model: Any) -> Any:
    """The optimizer that Keras's own training step applies."""
    trains = isinstance(model, keras.Model) and model.compiled and model.train_function is not None
    return model.optimizer if trains and type(model).train_step is keras.Model.train_step else None
