"""Ranks with different numbers of batches, in a whole training loop."""

from __future__ import annotations

import pytest

from tests.parallel.job import run


@pytest.mark.parametrize(("framework", "ranks"), [("torch", 2), ("torch", 3), ("tensorflow", 2)])
def test_training(framework: str, ranks: int) -> None:
    run(f"{framework}_uneven", ranks, HOROVOD_DYNAMIC_PROCESS_SETS="1").values("check_training")
