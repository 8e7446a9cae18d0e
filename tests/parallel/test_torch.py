"""The PyTorch layer on several ranks: every check of checks/torch.py and checks/torch_death.py, one job per rank count."""

from __future__ import annotations

import pytest

from hvd_syncbn import native, vectors
from tests.parallel.job import Job, checks, run
from tests.torch_tools import LAYOUTS

RANKS = (1, 2, 3, 4)


def job(ranks: int) -> Job:
    # Timelines and process sets that start while a job runs have to be asked for.
    return run("torch", ranks, HOROVOD_TIMELINE="DYNAMIC", HOROVOD_DYNAMIC_PROCESS_SETS="1")


@pytest.mark.parametrize("check", checks("torch"))
@pytest.mark.parametrize("ranks", RANKS)
def test_check(ranks: int, check: str) -> None:
    reasons = job(ranks).values(check)
    if isinstance(reasons[0], str):
        pytest.skip(reasons[0])


def test_one_digest_for_all() -> None:
    """1, 2, 3, 4 ranks; even, uneven, empty and shuffled splits; layouts, threads and instruction sets: one sha256."""
    digests = {}
    for ranks in RANKS:
        for of_rank in job(ranks).values("check_digest"):
            digests.update(of_rank)
            assert len(of_rank) == len(vectors.SPLITS) * len(LAYOUTS) * 2 * len(native.isas())
    assert len(digests) == len(RANKS) * len(of_rank)
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("check", checks("torch_groups"))
def test_groups(check: str) -> None:
    run("torch_groups", 4, HOROVOD_DYNAMIC_PROCESS_SETS="1").values(check)


@pytest.mark.parametrize(("ranks", "dying", "direction"), [(2, 1, "forward"), (3, 0, "backward")])
def test_a_rank_dies(ranks: int, dying: int, direction: str) -> None:
    """The survivors get HorovodInternalError, which hvd.elastic restores from; each says how long it took."""
    outcomes = run("torch_death", ranks, 120, DYING_RANK=str(dying), DYING_DIRECTION=direction)
    for rank, outcome in enumerate(outcomes.ranks):
        if rank == dying:
            assert outcome == {}
        else:
            assert set(outcome) == {"check_survivors"} and "value" in outcome["check_survivors"], (outcome, outcomes.output)
            assert outcome["check_survivors"]["value"]["seconds"] < 10
    assert "(ended after" not in outcomes.output
