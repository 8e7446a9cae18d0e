"""What the checks of both frameworks ask about the stages of an allreduce that Horovod records (patch 0042)."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

CALLS = 50


def stages_are_recorded(hvd: Any, allreduce: Callable[[], object]) -> None:
    """Check the times of several calls. Most calls run their own cycle (patch 0039)."""
    library = hvd.mpi_ops._basics.MPI_LIB_CTYPES
    moments = (ctypes.c_int64 * 4)()
    allreduce()
    assert library.horovod_last_stages(moments) == -1
    library.horovod_record_stages(True)
    ran_by_caller = 0
    for _ in range(CALLS):
        start = time.monotonic_ns()
        allreduce()
        end = time.monotonic_ns()
        by_caller = library.horovod_last_stages(moments)
        assert by_caller in (0, 1)
        ran_by_caller += by_caller
        enqueued, began, agreed, run = moments
        assert start <= enqueued < run <= end
        assert began < agreed < run
        assert enqueued < agreed
    library.horovod_record_stages(False)
    assert ran_by_caller > CALLS / 2
    before = list(moments)
    allreduce()
    library.horovod_last_stages(moments)
    assert list(moments) == before
