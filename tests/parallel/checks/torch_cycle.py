"""Packets and Horovod's cycle; see test_cycle.py, whose job has a cycle of a second."""

from __future__ import annotations

import time

import horovod.torch as hvd
import torch

from hvd_syncbn.torch import SyncBatchNorm

STEPS = 10


def check_layers_do_not_wait_for_the_cycle() -> float:
    """Seconds that STEPS steps of a layer took, two packets each, after one that made the ranks agree on them."""
    layer = SyncBatchNorm(4)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    layer(x).sum().backward()
    start = time.monotonic()
    for _ in range(STEPS):
        layer(x).sum().backward()
    return time.monotonic() - start


def check_waiting_threads_do_not_wait_for_the_cycle() -> float:
    """Seconds that STEPS of each collective took, in a thread that waits for it."""
    start = time.monotonic()
    for _ in range(STEPS):
        assert hvd.allreduce(torch.ones(3), name="sum", op=hvd.Sum).tolist() == [hvd.size()] * 3
        assert hvd.broadcast(torch.tensor([hvd.rank()]), 1, name="copy").tolist() == [1]
        assert hvd.allgather(torch.tensor([hvd.rank()]), name="all").tolist() == list(range(hvd.size()))
    return time.monotonic() - start
