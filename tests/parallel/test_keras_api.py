"""Horovod's Keras API on two ranks, by its names: see checks/keras_api.py."""

from __future__ import annotations

import pytest

from tests.parallel.job import checks, run


@pytest.mark.parametrize("check", checks("keras_api"))
def test_keras_api(check: str) -> None:
    run("keras_api", 2, timeout=500, HOROVOD_TIMELINE="DYNAMIC").values(check)
