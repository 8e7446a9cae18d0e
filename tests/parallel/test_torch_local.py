"""What would be local to a rank without an error, on two ranks: see checks/torch_local.py."""

from __future__ import annotations

import pytest

from tests.parallel.job import checks, run


@pytest.mark.parametrize("check", checks("torch_local"))
def test_check(check: str) -> None:
    values = run("torch_local", 2, 180).values(check)
    if check == "check_meta_on_one_rank":
        assert "layer 'layer' on one device. Received: input on cpu, weight on meta" in values[1]["error"]
        assert "shut down" in values[0]["error"] and values[0]["seconds"] < 10
