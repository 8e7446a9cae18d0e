"""Several optimizers, float8 and backups on two ranks: see checks/keras_several.py."""

from __future__ import annotations

import pytest

from tests.parallel.job import checks, run


@pytest.mark.parametrize("check", checks("keras_several"))
def test_keras_several(check: str) -> None:
    run("keras_several", 2, timeout=500).values(check)
