"""Faults that a job lives through: the results are those of a job without them. Two ranks; see test_faults.py.

The timeline, which this job is to write, has no space: /dev/full.
"""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import horovod.torch as hvd
import torch
from torch import nn

from hvd_syncbn.torch import convert_sync_batchnorm
from tests.torch_tools import Result, assert_same, randn, randomize, step

ROWS = slice(3 * hvd.rank(), 3 * hvd.rank() + 3)


def train(**hooks: Any) -> Result:
    """One step of two layers; what it gives."""
    model = randomize(convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))))
    if "between" in hooks:
        model[1].register_forward_hook(lambda *_: hooks["between"]())
    return step(model, randn(1, 6, 4)[ROWS], randn(2, 6, 4)[ROWS])


def check_no_space_for_the_timeline() -> None:
    """The first: from now on, whatever is written fails."""
    for _ in range(20):
        assert torch.equal(hvd.allreduce(torch.ones(1), op=hvd.Sum), torch.tensor([2.0]))
    time.sleep(1)  # the timeline's writer has seen it


def check_a_slow_rank() -> dict[str, Any]:
    """Others wait for it for longer than the stall check does, and get a warning, not an error."""
    want = train()
    start = time.monotonic()
    assert_same(train(between=lambda: time.sleep(4 if hvd.rank() == 1 else 0)), want)
    return {"seconds": time.monotonic() - start}


def check_an_allreduce_fails_and_is_retried() -> None:
    """On one rank, before it sends anything: no statistics are touched, and a second try gives what the first would have."""
    want = train()
    real, calls = hvd.allreduce_async_, []

    def failing(packet: Any, **options: Any) -> Any:
        calls.append(options["name"])
        if hvd.rank() == 1 and len(calls) == 1:
            raise hvd.mpi_ops.HorovodInternalError("the network is down")
        return real(packet, **options)

    model = randomize(convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with mock.patch.object(hvd, "allreduce_async_", failing):
        if hvd.rank() == 1:
            try:
                step(model, randn(1, 6, 4)[ROWS], randn(2, 6, 4)[ROWS])
            except hvd.mpi_ops.HorovodInternalError:
                assert_same(dict(model.state_dict()), before)
            else:
                raise AssertionError("no error")
        assert_same(step(model, randn(1, 6, 4)[ROWS], randn(2, 6, 4)[ROWS]), want)
    assert len(calls) == (5 if hvd.rank() == 1 else 4)


def check_start_again() -> None:
    """hvd.shutdown() and hvd.init(), as after an error that all ranks have had."""
    want = train()
    hvd.shutdown()
    hvd.init()
    assert_same(train(), want)
