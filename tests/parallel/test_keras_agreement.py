"""What Keras's callbacks agree on, on two ranks: see checks/keras_agreement.py."""

from __future__ import annotations

import pytest

from tests.parallel.job import checks, run


@pytest.mark.parametrize("check", checks("keras_agreement"))
def test_keras_agreement(check: str) -> None:
    run("keras_agreement", 2, timeout=500, HOROVOD_DYNAMIC_PROCESS_SETS="1").values(check)
