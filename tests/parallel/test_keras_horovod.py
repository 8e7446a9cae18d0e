"""The Keras 3 glue on two ranks: see checks/keras_horovod.py."""

from __future__ import annotations

import pytest

from tests.parallel.job import checks, run


@pytest.mark.parametrize("check", checks("keras_horovod"))
def test_keras_horovod(check: str) -> None:
    run("keras_horovod", 2, timeout=500, HOROVOD_DYNAMIC_PROCESS_SETS="1").values(check)
