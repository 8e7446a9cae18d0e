"""The batch norm layers of common networks, for the cost model, and the blocks of a ResNet, for the benchmarks."""

from __future__ import annotations

import math
from typing import NamedTuple

STEM = 64
EXPANSION = 4


class Block(NamedTuple):
    """A bottleneck block: 1x1, 3x3 with the stride, 1x1 to `EXPANSION * channels`; `project` adds a 1x1 to the shortcut."""

    channels: int
    stride: int
    project: bool


def resnet(depths: tuple[int, ...] = (3, 4, 6, 3)) -> list[Block]:
    """Return the blocks of a ResNet; the default depths are those of ResNet-50."""
    return [
        Block(64 << stage, 2 if i == 0 and stage > 0 else 1, i == 0) for stage, depth in enumerate(depths) for i in range(depth)
    ]


def channels(blocks: list[Block]) -> list[int]:
    """Return the number of channels of each batch norm of a ResNet."""
    found = [STEM]
    for block in blocks:
        wide = EXPANSION * block.channels
        found += [block.channels, block.channels, wide, *[wide] * block.project]
    return found


def efficientnet(width: float, depth: float) -> list[int]:
    """Return the number of channels of each batch norm of an EfficientNet: B0 is (1, 1), B4 (1.4, 1.8)."""

    def filters(count: int) -> int:
        rounded = max(8, int(count * width + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * count * width else rounded

    inputs = filters(32)
    found = [inputs]
    # (expansion, channels, repeats) of the seven stages
    for expansion, count, repeats in ((1, 16, 1), (6, 24, 2), (6, 40, 2), (6, 80, 3), (6, 112, 3), (6, 192, 4), (6, 320, 1)):
        for _ in range(math.ceil(repeats * depth)):
            wide = inputs * expansion
            found += [wide] * (2 if expansion > 1 else 1) + [filters(count)]
            inputs = filters(count)
    return [*found, filters(1280)]


def deeplab_head() -> list[int]:
    """Return the channels that DeepLabv3+ adds to its backbone: five branches of ASPP, their projection, the decoder."""
    return [256] * 5 + [256, 48, 256, 256]


NETWORKS = {
    "ResNet-50": channels(resnet()),
    "DeepLabv3+ (ResNet-101)": channels(resnet((3, 4, 23, 3))) + deeplab_head(),
    "EfficientNet-B0": efficientnet(1, 1),
    "EfficientNet-B4": efficientnet(1.4, 1.8),
}
