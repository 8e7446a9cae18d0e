"""Packets and Horovod's cycle; see test_cycle.py, whose job has a cycle of a second."""

from __future__ import annotations

import time

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
