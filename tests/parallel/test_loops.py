"""Ranks without input for a part of the network, and micro-batches, in both frameworks: see checks/*_loops.py."""

from __future__ import annotations

import pytest

from tests.parallel.job import checks, run

GROUPS = ("torch_loops", "tensorflow_loops")
CASES = [(group, check) for group in GROUPS for check in checks(group)]


@pytest.mark.parametrize(("group", "check"), CASES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_check(ranks: int, group: str, check: str) -> None:
    run(group, ranks, 150, HOROVOD_DYNAMIC_PROCESS_SETS="1").values(check)
