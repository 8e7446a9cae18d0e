"""Batch renormalization: one sha256 across frameworks, layouts, numbers of ranks and splits of the batch."""

from __future__ import annotations

import pytest

from tests.parallel.job import run


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_a_rank_with_nothing_and_micro_batches(framework: str, ranks: int) -> None:
    run(f"{framework}_renorm", ranks).values("check_a_rank_with_nothing_and_micro_batches")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parameter_gradients_are_shares(ranks: int) -> None:
    run("torch_renorm", ranks).values("check_parameter_gradients_are_shares")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_one_collective_per_direction(ranks: int) -> None:
    run("torch_renorm", ranks).values("check_one_collective_per_direction")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_compiled(ranks: int) -> None:
    run("torch_renorm", ranks).values("check_compiled")


def test_one_sha256() -> None:
    digests = {
        digest
        for framework in ("torch", "tensorflow")
        for ranks in (1, 2, 3)
        for own in run(f"{framework}_renorm", ranks).values("check_digest")
        for digest in own
    }
    assert len(digests) == 1
