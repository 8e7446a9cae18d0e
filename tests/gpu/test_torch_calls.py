"""Backward packets on a GPU: those of another call are found by the kernels, also where nobody wants an input gradient."""

from __future__ import annotations

import pytest
import torch

from hvd_syncbn.torch_impl import ops
from tests.torch_tools import assert_same, randn


def test_another_call() -> None:
    x, dy = randn(1, 4, 5, 3), randn(2, 4, 5, 3)
    stats = [torch.stack([x.double().mean((0, 2)) + i, torch.ones(5, dtype=torch.float64)]) for i in range(2)]
    on_cpu = [ops.backward_moments(x, dy, None, s, torch.float32)[0] for s in stats]
    packets = [ops.backward_moments(x.cuda(), dy.cuda(), None, s.cuda(), torch.float32)[0] for s in stats]
    for packet, want in zip(packets, on_cpu, strict=True):
        assert_same(packet.cpu(), want)
    vector = torch.arange(5.0, device="cuda")
    for packet, fails in ((packets[0] + packets[1], True), (packets[0] * 3, False)):
        dx, _ = ops.backward_apply(x.cuda(), dy.cuda(), None, packet, stats[0].cuda(), None, False, "head.bn")
        assert dx.isnan().all() == fails
        for i in range(2):
            if i:
                for copy in ops.backward_check(packet, vector, vector, "head.bn"):
                    assert_same(copy.cpu(), vector.cpu())
            torch.cuda.synchronize()
            if fails:
                with pytest.raises(ValueError, match=r"different calls of layer 'head\.bn'"):
                    ops.check_device_errors()
            else:
                ops.check_device_errors()
