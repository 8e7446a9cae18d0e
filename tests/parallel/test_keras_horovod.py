"""The Keras 3 glue on several ranks: see checks_keras_horovod.py."""

from __future__ import annotations

import pytest

from tests.parallel.job import checks, run


@pytest.mark.timeout(700)
@pytest.mark.parametrize("check", checks("keras_horovod"))
@pytest.mark.parametrize("ranks", [2, 3])
def test_keras_horovod(ranks: int, check: str) -> None:
    run("keras_horovod", ranks, timeout=600, HOROVOD_DYNAMIC_PROCESS_SETS="1").values(check)
