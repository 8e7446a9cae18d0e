"""`recalibrate` on 1, 2 and 3 ranks in both frameworks: one sha256 for every way of dealing out the data."""

from __future__ import annotations

from typing import Any

import pytest

from tests import recalibration
from tests.parallel.job import Job, checks, run

RANKS = (1, 2, 3)
GROUPS = ("torch_recalibrate", "tensorflow_recalibrate")


def job(group: str, ranks: int) -> Job:
    return run(group, ranks, 300, HOROVOD_DYNAMIC_PROCESS_SETS="1")


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("group", "check"), [(group, check) for group in GROUPS for check in checks(group)])
def test_check(group: str, check: str, ranks: int) -> None:
    job(group, ranks).values(check)


@pytest.mark.parametrize("way", ["pooled", "layer by layer", "batches"])
def test_one_sha256(way: str) -> None:
    """Ranks x even, uneven and empty shards x frameworks x layouts, for all layers of a stack; and it is the reference's."""
    found: dict[str, Any] = {}
    for group in GROUPS:
        for ranks in RANKS:
            for rank, digests in enumerate(job(group, ranks).values("check_digests")):
                mine = {
                    f"{group}, rank {rank} of {ranks}, {variant}": d
                    for variant, d in digests.items()
                    if variant.startswith(way)
                }
                assert len(mine) == len(recalibration.SPLITS) * 2
                found |= mine
    exact = way == "layer by layer"
    reference = recalibration.reference("pooled" if exact else way, recalibration.LAYERS if exact else 1)
    assert set(found.values()) == {recalibration.digest(reference)}, found
