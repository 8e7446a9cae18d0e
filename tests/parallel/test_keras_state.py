"""State of layers beside their variables on two ranks: see checks/keras_state.py."""

from __future__ import annotations

import pytest

from tests.parallel.job import checks, run


@pytest.mark.parametrize("check", checks("keras_state"))
def test_keras_state(check: str) -> None:
    run("keras_state", 2, timeout=500).values(check)
