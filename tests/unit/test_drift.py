"""The comparison of ranks, without a framework: each rank is a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from hvd_syncbn import drift
from hvd_syncbn.drift import Difference, Entry


def compare(lists: Sequence[list[Entry]], ranks: Sequence[int] | None = None) -> Difference | None:
    """What `find_difference` returns on every rank, given what each holds."""
    ranks = range(len(lists)) if ranks is None else ranks
    board: list[Any] = [None] * len(lists)
    barrier = threading.Barrier(len(lists), timeout=20)

    def gather_of(place: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            board[place] = value
            barrier.wait()
            values = list(board)
            barrier.wait()
            return values

        return gather

    def run(place: int) -> Difference | None:
        return drift.find_difference(lambda: lists[place], ranks[place], ranks, gather_of(place))

    with ThreadPoolExecutor(len(lists)) as pool:
        found = list(pool.map(run, range(len(lists))))
    assert found == found[:1] * len(found)
    return found[0]


def message(*lists: list[Entry], ranks: Sequence[int] | None = None) -> str:
    difference = compare(lists, ranks)
    assert difference is not None
    return difference.message


def test_digest_sees_every_bit() -> None:
    rng = np.random.default_rng(0)
    for shape in ((), (1,), (7,), (3, 5), (64, 3, 7, 7), (2, 1021), (300, 502)):
        array = rng.normal(size=shape).astype(np.float32)
        before = drift.digest(array)
        assert before == drift.digest(array.copy())
        for position in {0, array.size // 2, array.size - 1}:
            changed = array.copy()
            changed.reshape(-1).view(np.uint32)[position] ^= 1
            assert drift.digest(changed) != before
    assert drift.digest(np.zeros(4, np.float32)) != drift.digest(np.zeros(2, np.float64))
    assert drift.digest(np.zeros((2, 3))) != drift.digest(np.zeros((3, 2)))
    assert drift.digest(np.zeros(1, bool)) != drift.digest(np.zeros(1, np.int8))
    assert drift.digest(np.array(["a" * 9], object)) == drift.digest(np.array(["aaa" * 3], object))
    assert drift.digest((0.1, "a")) != drift.digest((0.2, "a"))


def test_digest_sees_exchanged_rows_and_channels() -> None:
    array = np.arange(512 * 512, dtype=np.float32).reshape(512, 512)
    before = drift.digest(array)
    for axis in (0, 1):
        for other in (1, 2, 251, 502):
            order = np.arange(512)
            order[[0, other]] = other, 0
            assert drift.digest(np.take(array, order, axis)) != before


def test_equal_ranks() -> None:
    entries = [Entry(drift.WEIGHT, "w", np.ones(3)), Entry(drift.LEARNING_RATE, "lr", 0.1), Entry(drift.OTHER, "none", None)]
    assert compare([entries, entries, entries]) is None
    assert compare([entries]) is None


def test_values_by_rank() -> None:
    entries = [[Entry(drift.WEIGHT, "w", np.ones(3)), Entry(drift.LEARNING_RATE, "adam", rate)] for rate in (0.3, 3e-6, 0.3)]
    assert message(*entries, ranks=[0, 2, 5]) == (
        "the ranks have drifted apart: learning rate 'adam' is not the same on all of them. Received: 0.3 on ranks 0, 5; "
        f"3e-06 on rank 2. {drift.CAUSES[drift.LEARNING_RATE]}"
    )


def test_first_fault_comes_before_rounding() -> None:
    weights = [np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0 + 1e-9, 4.0])]
    rounded = [[Entry(drift.WEIGHT, "kernel", weight)] for weight in weights]
    difference = compare(rounded)
    assert difference is not None and not difference.is_fault
    assert "weight 'kernel' is not" in difference.message and "rank 1 differs from rank 0 by up to 1e-09" in difference.message
    assert "values are up to 4. This may be rounding" in difference.message
    both = [[*one, Entry(drift.STATISTICS, "mean", np.float32([0.0, i]))] for i, one in enumerate(rounded)]
    difference = compare(both)
    assert difference is not None and difference.is_fault
    assert "running statistics 'mean' (and 1 more value) is not" in difference.message


@pytest.mark.parametrize(
    ("kind", "values", "is_fault"),
    [
        (drift.WEIGHT, (np.float32([1, 2]), np.float32([1, 2.1])), True),
        (drift.WEIGHT, (np.float32([1, 2]), np.float32([1, np.nan])), True),
        (drift.WEIGHT, (np.float32([1]), np.float32([1 + 2e-7])), False),
        (drift.WEIGHT, (np.int8([100, 100]), np.int8([100, 101])), True),
        (drift.WEIGHT, (np.float32([1, 2]), np.float64([1, 2])), True),
        (drift.OPTIMIZER_STATE, (np.float32([1, 2]), np.float32([1, 2 + 2e-7])), False),
        (drift.LEARNING_RATE, (np.float32(1), np.float32(1 + 2e-7)), True),
        (drift.STATISTICS, (np.float32([1, 2]), np.float32([1, 2 + 2e-7])), True),
        (drift.OTHER, (np.float32([1, 2]), np.float32([5, 6])), False),
        (drift.LAYER_STATE, (["a", "b"], ["b", "a"]), True),
        (drift.LAYER_STATE, (np.array(["a", "b"], object), np.array(["b", "a"], object)), True),
        (drift.LAYER_STATE, (np.array(["a", "b"]), np.array(["b", "a"])), True),
        (drift.WEIGHT, (np.complex64([1j, 2]), np.complex64([1j, 3])), True),
    ],
)
def test_what_is_a_fault(kind: str, values: tuple[Any, Any], is_fault: bool) -> None:
    difference = compare([[Entry(kind, "x", value)] for value in values])
    assert difference is not None and difference.is_fault == is_fault
    assert f"{kind} 'x' is not the same on all of them. Received: " in difference.message


def test_groups_agree_inside() -> None:
    def lists(*values: float) -> list[list[Entry]]:
        groups = [(0, 1), (0, 1), (2, 3), (2, 3)]
        return [[Entry(drift.STATISTICS, "mean", np.full(2, v), g)] for v, g in zip(values, groups, strict=True)]

    assert compare(lists(1, 1, 2, 2)) is None
    assert "rank 3 differs from rank 2 by up to 1, where values are up to 2" in message(*lists(1, 1, 2, 3))


def test_layout_in_memory_is_no_difference() -> None:
    array = np.random.default_rng(0).normal(size=(4, 3, 5, 5))
    last = np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert last.strides != array.strides
    assert compare([[Entry(drift.WEIGHT, "w", array)], [Entry(drift.WEIGHT, "w", last)]]) is None
    other = last.copy()
    other[0, 0, 0, 0] += 1
    assert "by up to 1," in message([Entry(drift.WEIGHT, "w", array)], [Entry(drift.WEIGHT, "w", other)])


def test_different_numbers_of_values() -> None:
    one = [Entry(drift.WEIGHT, "w", np.ones(3)), Entry(drift.OPTIMIZER_STATE, "m", np.ones(3))]
    assert "Received: by rank, optimizer state: [1, 0]. " in message(one, one[:1])
