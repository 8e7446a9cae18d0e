"""What the room asks of Horovod and of the other ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from hvd_syncbn import horovod

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet


def require() -> Any:
    """Return Horovod, or say what is missing and how to get it."""
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "training Keras under Horovod needs its TensorFlow backend: set KERAS_BACKEND=tensorflow. "
            f"Received: KERAS_BACKEND={keras.backend.backend()}"
        )
    return horovod.require("tensorflow")


def require_to_communicate() -> Any:
    """Return Horovod for a collective of the caller, which needs Horovod's thread also where there is one rank."""
    hvd = require()
    horovod.check_not_forked(hvd)
    return hvd


def gather(value: object, name: str, process_set: ProcessSet | None) -> tuple[list[Any], Any, ProcessSet]:
    """Return the values of all ranks, Horovod and the process set."""
    hvd = require()
    process_set = process_set or hvd.global_process_set
    if horovod.size(hvd, process_set) == 1:
        return [value], hvd, process_set
    return hvd.allgather_object(value, name=f"hvd_syncbn.{name}", process_set=process_set), hvd, process_set
