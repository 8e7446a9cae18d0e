"""Access to Horovod and to the other ranks for the Keras modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

from hvd_syncbn import horovod

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet


# Each check is called with a model that several ranks train, and with whether this rank reports what concerns all ranks.
# `training.start` registers its check here, so that the layer and the optimizer can run it without importing that module.
training_checks: list[Callable[[keras.layers.Layer, bool], None]] = []


def require() -> Any:
    """Return Horovod's TensorFlow module; raise ``RuntimeError`` if it cannot be used."""
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "training under Horovod needs Keras's TensorFlow backend: set KERAS_BACKEND=tensorflow. "
            f"Received: KERAS_BACKEND={keras.backend.backend()}"
        )
    return horovod.require("tensorflow")


def require_to_communicate() -> Any:
    """Return Horovod for a collective of the caller, which needs Horovod's background thread even on one rank."""
    hvd = require()
    horovod.check_not_forked(hvd)
    return hvd


def gather(value: object, name: str, process_set: ProcessSet | None) -> tuple[list[Any], Any, ProcessSet]:
    """Return the values of all ranks, Horovod's module and the process set."""
    hvd = require()
    process_set = process_set or hvd.global_process_set
    if horovod.size(hvd, process_set) == 1:
        return [value], hvd, process_set
    return hvd.allgather_object(value, name=f"hvd_syncbn.{name}", process_set=process_set), hvd, process_set


def check_before_training(model: keras.layers.Layer, process_set: ProcessSet | None = None) -> None:
    """Run the training checks on a model if several ranks train it. The first rank reports what concerns all ranks."""
    hvd = require()
    if horovod.size(hvd, process_set) > 1:
        among: Any = process_set if horovod.process_set_id(process_set) else hvd
        for check in training_checks:
            check(model, among.rank() == 0)
