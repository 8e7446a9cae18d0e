"""Processes forked from a rank, such as data loaders' workers: an error instead of waiting forever."""

from __future__ import annotations

import pytest

from tests.parallel.job import checks, run


@pytest.mark.parametrize("check", checks("torch_forked_layers"))
@pytest.mark.parametrize("ranks", [1, 2])
def test_torch(ranks: int, check: str) -> None:
    run("torch_forked_layers", ranks, 300, HOROVOD_DYNAMIC_PROCESS_SETS="1").values(check)


@pytest.mark.parametrize("check", checks("tensorflow_forked_layers"))
def test_tensorflow(check: str) -> None:
    run("tensorflow_forked_layers", 2, 480, HOROVOD_DYNAMIC_PROCESS_SETS="1").values(check)
