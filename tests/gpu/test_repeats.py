"""The same bytes 200 times, while other streams keep the multiprocessors busy: the order of blocks must not show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvd_syncbn.torch_impl import ops
from tests.torch_tools import DTYPES, LAYOUTS, assert_same, in_layout, randn

EPS = 1e-5
REPEATS = 200
STREAMS = 3
# One of every form of the kernels: 2-D, 7x7, and long rows in many and in few pieces.
SHAPES = [(300, 70), (16, 96, 7, 7), (8, 33, 28, 28), (1, 5, 65, 64)]


def bits(tensor: Tensor) -> Tensor:
    """The values as integers, so that NaN equals NaN and the zeros differ."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_200_times(shape: tuple[int, ...], dtype: str, layout: str) -> None:
    c = shape[1]
    x, dy = (in_layout(randn(seed, *shape, dtype=DTYPES[dtype]), layout).cuda() for seed in (1, 2))
    weight, bias = randn(3, c).cuda(), randn(4, c).cuda()

    def step() -> list[Tensor]:
        mean, var = torch.zeros(c, device="cuda"), torch.ones(c, device="cuda")
        packet = ops.forward_moments(x, EPS)
        y, stats = ops.forward_apply(x, packet, weight, bias, None, mean, var, None, 0.9, 0.1, True, True, EPS, True, "layer")
        back, dweight, dbias = ops.backward_moments(x, dy, y, stats, torch.float32)
        dx, dresidual = ops.backward_apply(x, dy, y, back, stats, weight, True, "layer")
        return [packet, y, stats, mean, var, back, dweight, dbias, dx, dresidual]

    want = step()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]
    load = randn(5, 64, 256, 14, 14).cuda()
    different = [torch.zeros(len(want), dtype=torch.int64, device="cuda") for _ in streams]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for i in range(REPEATS):
        at = i % STREAMS
        with torch.cuda.stream(streams[at]):
            got = step()
            different[at] += torch.stack([(bits(a) != bits(b)).any() for a, b in zip(got, want, strict=True)])
        # The kernels of other layers on the streams beside it.
        with torch.cuda.stream(streams[(i + 1) % STREAMS]):
            ops.forward_moments(load, EPS)
    torch.cuda.synchronize()
    names = ["packet", "y", "stats", "mean", "var", "back", "dweight", "dbias", "dx", "dresidual"]
    found = dict(zip(names, torch.stack([count.cpu() for count in different]).sum(0).tolist(), strict=True))
    assert not any(found.values()), f"repeats that differ, of {REPEATS}: {found}"
    assert_same(want[0].cpu(), ops.forward_moments(x.cpu(), EPS))
