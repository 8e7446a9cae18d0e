"""What the room asks of Horovod and of the other ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from hvd_syncbn import horovod

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet

    from hvd_syncbn.tf_impl.horovod import Group


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


def find(process_set: ProcessSet | None) -> Group:
    """Return the group of ranks behind a `process_set` argument (None is all ranks)."""
    require()
    from hvd_syncbn.tf_impl import ranks

    return ranks.find(process_set)
