"""A ResNet-50 (53 batch norms) as a list of blocks, for both frameworks; also what the cost model counts."""

from __future__ import annotations

from typing import NamedTuple

STEM = 64
EXPANSION = 4


class Block(NamedTuple):
    """A bottleneck: 1x1, 3x3 with the stride, 1x1 to `EXPANSION` times the channels; a stage's first projects its shortcut."""

    channels: int
    stride: int
    project: bool


def resnet(depths: tuple[int, ...] = (3, 4, 6, 3)) -> list[Block]:
    """The blocks of a ResNet: 3, 4, 6, 3 are ResNet-50's stages."""
    return [
        Block(64 << stage, 2 if i == 0 and stage > 0 else 1, i == 0) for stage, depth in enumerate(depths) for i in range(depth)
    ]


def channels(blocks: list[Block]) -> list[int]:
    """Of every batch norm of a ResNet."""
    found = [STEM]
    for block in blocks:
        wide = EXPANSION * block.channels
        found += [block.channels, block.channels, wide, *[wide] * block.project]
    return found
