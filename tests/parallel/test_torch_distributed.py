"""The PyTorch layer over torch.distributed, without Horovod: every check of checks/torchrun.py under torchrun; and faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hvd_syncbn import vectors
from hvd_syncbn.cli.stacks import reference_stack
from tests.needs import need
from tests.parallel.job import ROOT, rank_environment
from tests.parallel.torchrun import checks, run

RANKS = (1, 2, 4)


@pytest.mark.parametrize("check", checks("torchrun"))
@pytest.mark.parametrize("ranks", RANKS)
def test_check(ranks: int, check: str) -> None:
    reasons = run("torchrun", ranks).values(check)
    if isinstance(reasons[0], str):
        pytest.skip(reasons[0])


def test_the_digest_of_every_engine() -> None:
    """1, 2 and 4 ranks, even, uneven, empty and shuffled splits, both layouts: the sha256 that `hvd-syncbn verify` expects."""
    digests = {}
    for ranks in RANKS:
        for of_rank in run("torchrun", ranks).values("check_digest"):
            digests.update(of_rank)
    assert len(digests) == len(RANKS) * len(vectors.SPLITS) * 2
    assert set(digests.values()) == {vectors.digest(*reference_stack())}, digests


@pytest.mark.parametrize("check", checks("torchrun_faults"))
def test_fault(check: str) -> None:
    """An error on every rank, and the job goes on; the last check kills rank 1."""
    job = run("torchrun_faults", 2, agent=False)
    if check == "check_a_rank_is_killed":
        assert "value" in job.ranks[0][check] and check not in job.ranks[1], job
        assert "(ended after" not in job.output
    else:
        job.values(check)


@pytest.mark.parametrize("trainer", ["ddp", "lightning", "accelerate"])
def test_example(trainer: str) -> None:
    need("torch" if trainer == "ddp" else trainer)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    starts_its_own = trainer == "lightning"
    command = [sys.executable, *(() if starts_its_own else torchrun), str(ROOT / f"examples/torchrun/with_{trainer}.py")]
    result = subprocess.run(command, env=rank_environment(), capture_output=True, text=True, timeout=200, check=False)
    assert "2 ranks, running mean" in result.stdout, result.stderr[-4000:]
