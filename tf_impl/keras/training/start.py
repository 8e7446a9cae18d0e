"""Warnings when several ranks start to train a model with plain batch norms or with optimizers that do not average.

The check runs when a synchronized layer is called in training, when `fit()` begins (callbacks), when a distributed optimizer
is applied in a model's training step, and when an elastic state is synchronized.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import keras

from hvd_syncbn.tf_impl.keras import ranks
from hvd_syncbn.tf_impl.keras.convert import batch_norms
from hvd_syncbn.tf_impl.keras.layer import SyncBatchNormalization
from hvd_syncbn.tf_impl.keras.training.optimizer import is_distributed, members

# The ids of the optimizers with which each model was checked.
_checked: WeakKeyDictionary[keras.layers.Layer, set[int | None]] = WeakKeyDictionary()


def warn_if_unsynchronized(model: keras.layers.Layer, names_local: bool) -> None:
    """Warn about parts of a model that each rank trains alone, once per model and optimizer.

    Args:
        model: A model that several ranks are about to train.
        names_local: Whether to warn if all batch norms of the model are plain. This may be intended, but a synchronized model
            that Keras loaded or cloned looks the same. Only one rank needs to warn about it.

    Raises:
        RuntimeError: A LossScaleOptimizer wraps a MultiOptimizer with distributed optimizers.

    Warns:
        UserWarning: The model has layers that are not synchronized, or is trained by `fit()` or `train_on_batch()` with an
            optimizer that does not average. Optimizers in custom training loops and in a custom `train_step` are not checked,
            because these may average with a `DistributedGradientTape`.
    """
    optimizer = _optimizer(model)
    seen = _checked.setdefault(model, set())
    if (optimizer and id(optimizer)) in seen:
        return
    inner = members(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) and any(map(is_distributed, inner[1:])):
        raise RuntimeError(
            "a LossScaleOptimizer wraps a MultiOptimizer with distributed optimizers: ranks would not agree on which steps to "
            "skip. Use `DistributedOptimizer(multi_optimizer)` with plain optimizers in it. "
            f"Received: model {model.name!r} with optimizer={optimizer!r}"
        )
    if not is_distributed(optimizer) and any(map(is_distributed, inner)):
        warnings.warn(
            f"model {model.name!r} trains on several ranks, but some of its optimizers do not average: with these, each rank "
            "applies its own gradients, and the weights diverge. Make all of them distributed, or make the MultiOptimizer "
            "distributed and leave its optimizers plain. "
            f"Received: not distributed: {[one.name for one in inner if not is_distributed(one)]}",
            stacklevel=2,
        )
    elif optimizer is not None and not is_distributed(optimizer):
        warnings.warn(
            f"model {model.name!r} trains on several ranks with an optimizer that does not average: each rank applies its own "
            "gradients, and the weights diverge. Compile with `hvd_syncbn.keras.DistributedOptimizer(optimizer)`, or load "
            f"with `hvd_syncbn.keras.load_model`. Received: optimizer={optimizer!r}",
            stacklevel=2,
        )
    if not seen:
        _check_norms(model, names_local)
    seen.add(optimizer and id(optimizer))


def _check_norms(model: keras.layers.Layer, names_local: bool) -> None:
    norms = list(batch_norms(model))
    plain = [path for path, norm in norms if not isinstance(norm, SyncBatchNormalization) and _uses_the_batch(norm)]
    if plain and len(plain) < len(norms):
        warnings.warn(
            f"model {model.name!r} trains on several ranks with batch normalizations that are synchronized and others that use "
            "the statistics of their rank. A custom class creates plain layers when Keras loads or clones it: use "
            "`hvd_syncbn.keras.load_model` or call `convert_sync_batchnorm(model)` again, or freeze the plain layers "
            f"(`trainable = False`). Received: plain layers {plain}",
            stacklevel=3,
        )
    elif plain and names_local:
        warnings.warn(
            f"model {model.name!r} trains on several ranks with local batch normalizations only, each with the statistics of "
            "its rank. If it was synchronized before Keras loaded or cloned it, use `hvd_syncbn.keras.load_model` or "
            "`convert_sync_batchnorm(model)`. If this is intended: "
            "warnings.filterwarnings('ignore', '.*several ranks with local batch normalizations'). "
            f"Received: plain layers {plain}",
            stacklevel=3,
        )


ranks.training_checks.append(warn_if_unsynchronized)


def _uses_the_batch(norm: Any) -> bool:
    return norm.trainable and not getattr(norm, "frozen", None)


def _optimizer(model: Any) -> Any:
    """Return the optimizer that Keras's own training step applies; None under a strategy, where Keras averages."""
    trains = isinstance(model, keras.Model) and model.compiled and model.train_function is not None
    if trains and model.distribute_strategy.num_replicas_in_sync > 1:
        return None
    return model.optimizer if trains and type(model).train_step is keras.Model.train_step else None
