"""A rank dies in the middle of a step: the others get Horovod's own error, at once, and nothing hangs.

Which rank, and in which direction, comes by environment from test_torch.py. It leaves no outcome.
"""

from __future__ import annotations

import os
import time
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from hvd_syncbn.torch import SyncBatchNorm
from tests.torch_tools import randn

DYING = int(os.environ["DYING_RANK"])
DIRECTION = os.environ["DYING_DIRECTION"]


class Death(torch.autograd.Function):
    """The identity, until this process ends in the direction asked for: as if it had been killed, with nothing cleaned up."""

    armed = False

    @staticmethod
    def end(direction: str) -> None:
        if Death.armed and hvd.rank() == DYING and direction == DIRECTION:
            os._exit(0)  # with another status, horovodrun would end everybody

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Death.end("forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        Death.end("backward")
        return dy


def check_survivors() -> dict[str, float]:
    first, second = SyncBatchNorm(3), SyncBatchNorm(3)
    x = randn(hvd.rank(), 4, 3, 5).requires_grad_()

    def step() -> Tensor:
        y = second(Death.apply(first(x)))
        y.square().sum().backward()
        return y

    step()
    Death.armed = True
    start = time.monotonic()
    try:
        step()
    except hvd.mpi_ops.HorovodInternalError as error:
        assert "disagree" not in str(error)
    else:
        raise AssertionError("no error")
    seconds = time.monotonic() - start
    # A batch that nobody normalised is not counted; evaluation goes on.
    assert (first.num_batches_tracked, second.num_batches_tracked) == (2, 1 if DIRECTION == "forward" else 2)
    assert first.eval()(x).isfinite().all()
    return {"seconds": seconds}
