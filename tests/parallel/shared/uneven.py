"""Who has how many samples in which global batch, in the tests of uneven training."""

from __future__ import annotations

from collections.abc import Sequence

# By ranks: for each global batch, samples of each rank; None once it has joined.
BATCHES: dict[int, list[list[int | None]]] = {
    2: [[3, 4], [5, 0], [0, 4], [2, 1], [None, 4], [None, 3]],
    3: [[3, 4, 2], [4, 0, 0], [0, 4, 1], [4, None, 2], [1, None, 5], [None, None, 6]],
}


def part(counts: Sequence[int | None], rank: int) -> slice:
    """The samples of a rank in the global batch."""
    before = [count or 0 for count in counts[:rank]]
    return slice(sum(before), sum(before) + (counts[rank] or 0))


def seed(number: int) -> int:
    """Of a global batch's data."""
    return 100 + number
