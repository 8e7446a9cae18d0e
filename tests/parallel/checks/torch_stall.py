"""PyTorch ranks that wait for each other for good; see stalls.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch

from hvd_syncbn.torch import SyncBatchNorm
from tests.parallel.shared import stalls


def layer(name: str) -> Callable[[], Any]:
    made = SyncBatchNorm(3)
    made.collective_name = name
    return lambda: made(torch.ones(2, 3, 4) * torch.arange(4.0))


def run(case: str) -> dict[str, Any]:
    return stalls.run(hvd, case, layer, (hvd.mpi_ops.HorovodInternalError,))


def check_a_layer_that_others_lack() -> dict[str, Any]:
    return run("check_a_layer_that_others_lack")


def check_another_order() -> dict[str, Any]:
    return run("check_another_order")


def check_a_rank_stops_early() -> dict[str, Any]:
    return run("check_a_rank_stops_early")
