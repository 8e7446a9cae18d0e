"""Access to Horovod and to the other ranks for the Keras modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

from hvd_syncbn import horovod

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet

    from hvd_syncbn.tf_impl import horovod as horovod_engine
    from hvd_syncbn.tf_impl.ranks import Group


# Each check is called with a model that several ranks train, and with whether this rank reports what concerns all ranks.
# `training.start` registers its check here, so that the layer and the optimizer can run it without importing that module.
training_checks: list[Callable[[keras.layers.Layer, bool], None]] = []


def require() -> Any:
    """Return Horovod's TensorFlow module; raise ``RuntimeError`` if it cannot be used."""
    _require_backend()
    return horovod.require("tensorflow")


def _require_backend() -> None:
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "synchronized training needs Keras's TensorFlow backend: set KERAS_BACKEND=tensorflow. "
            f"Received: KERAS_BACKEND={keras.backend.backend()}"
        )


def require_to_communicate() -> Any:
    """Return Horovod for a collective of the caller, which needs Horovod's background thread even on one rank."""
    hvd = require()
    horovod.check_not_forked(hvd)
    return hvd


def find(process_set: ProcessSet | tuple[int, ...] | None, who: str = "the model") -> Group:
    """Return the group of ranks behind a `process_set` argument (None is all ranks; a saved layer has only the ranks)."""
    _require_backend()
    from hvd_syncbn.tf_impl import ranks

    return ranks.find(process_set, who)


def find_horovod(process_set: ProcessSet | None) -> horovod_engine.Group:
    """Return the ranks of Horovod behind a `process_set` argument, for what only Horovod does."""
    require()
    from hvd_syncbn.tf_impl import horovod

    return horovod.Group(process_set)


def check_before_training(model: keras.layers.Layer, process_set: ProcessSet | None = None) -> None:
    """Run the training checks on a model if several ranks train it. The first rank reports what concerns all ranks."""
    group = find_horovod(process_set)
    if group.size > 1:
        for check in training_checks:
            check(model, group.rank == group.ranks[0])
