"""Keras ranks that wait for each other for good; see stalls.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

from hvd_syncbn.keras import SyncBatchNormalization
from tests.parallel.shared import stalls


def layer(name: str) -> Callable[[], Any]:
    made = SyncBatchNormalization(name=name)
    x = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    return lambda: made(x, training=True)


def run(case: str) -> dict[str, Any]:
    return stalls.run(hvd, case, layer, (HorovodInternalError, tf.errors.UnknownError))


def check_a_layer_that_others_lack() -> dict[str, Any]:
    return run("check_a_layer_that_others_lack")


def check_another_order() -> dict[str, Any]:
    return run("check_another_order")


def check_a_rank_stops_early() -> dict[str, Any]:
    return run("check_a_rank_stops_early")
