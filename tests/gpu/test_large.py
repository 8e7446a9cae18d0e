"""Tensors of more than 2^31 elements, both directions and layouts: parts of the batch have the bytes of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvd_syncbn import protocol
from hvd_syncbn.torch_impl import ops
from tests.torch_tools import LAYOUTS

EPS = 1e-5
SHAPE = (3, 2, 2**29 - 3)
GIB = 40  # of x, dy, one output and a part's


def integers(packet: Tensor, channels: int) -> list[int]:
    """The sums of a packet's limbs."""
    limbs = packet.cpu()[protocol.HEADER + channels :].reshape(-1, protocol.LIMBS).tolist()
    return [sum(limb << (protocol.LIMB_BITS * i) for i, limb in enumerate(row)) for row in limbs]


def check(shape: tuple[int, int, int], layout: str) -> None:
    n, c, s = shape
    memory = shape if layout == "contiguous" else (n, s, c)

    def values() -> Tensor:
        made = torch.empty(memory, dtype=torch.bfloat16, device="cuda").normal_()
        return made if layout == "contiguous" else made.movedim(-1, 1)

    def same(part: Tensor, whole: Tensor) -> bool:
        return torch.equal(part.view(torch.int16), whole.view(torch.int16))

    x = values()
    packet = ops.forward_moments(x, EPS)
    parts = torch.stack([ops.forward_moments(x[i : i + 1], EPS) for i in range(n)])
    assert packet[1] == n * s and integers(packet, c) == integers(parts.sum(0), c)

    def apply(part: Tensor) -> tuple[Tensor, Tensor]:
        return ops.forward_apply(part, packet, None, None, None, None, None, None, 0.9, 0.1, True, True, EPS, False, "layer")

    y, stats = apply(x)
    for i in range(n):
        assert same(apply(x[i : i + 1])[0][0], y[i])
    del y
    dy = values()
    back = ops.backward_moments(x, dy, None, stats, torch.float32)[0]
    parts = torch.stack([ops.backward_moments(x[i : i + 1], dy[i : i + 1], None, stats, torch.float32)[0] for i in range(n)])
    assert integers(back, c) == integers(parts.sum(0), c)

    def gradient(part: slice) -> Tensor:
        return ops.backward_apply(x[part], dy[part], None, back, stats, None, False, "layer")[0]

    dx = gradient(slice(n))
    for i in range(n):
        assert same(gradient(slice(i, i + 1))[0], dx[i])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_31_elements(layout: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < GIB * 2**30:
        pytest.skip(f"needs a GPU with {GIB} GiB of memory")
    check(SHAPE, layout)
