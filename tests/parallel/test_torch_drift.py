"""PyTorch's `check_ranks_agree` on two ranks: see checks/torch_drift.py."""

from __future__ import annotations

import pytest

from tests.parallel.job import checks, run


@pytest.mark.parametrize("check", checks("torch_drift"))
def test_torch_drift(check: str) -> None:
    run("torch_drift", 2, HOROVOD_DYNAMIC_PROCESS_SETS="1").values(check)
