"""Ranks of one host exchange through shared memory (patch 0038), in the thread that waits (patch 0039)."""

from __future__ import annotations

import pytest

from tests.parallel.job import checks, run


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("check", checks("torch_shared_memory"))
def test_torch(check: str, ranks: int) -> None:
    values = run("torch_shared_memory", ranks).values(check)
    if check == "check_join":
        assert values == [ranks - 1] * ranks


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("check", checks("tensorflow_shared_memory"))
def test_tensorflow(check: str, ranks: int) -> None:
    values = run("tensorflow_shared_memory", ranks).values(check)
    if check == "check_join":
        assert values == [ranks - 1] * ranks
