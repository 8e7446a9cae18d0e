"""XLA and exports on 1 and 2 ranks: what is refused, and that auto-clustering leaves the bytes alone."""

from __future__ import annotations

import pytest

from tests.parallel.job import Job, checks, run

RANKS = (1, 2)
CLUSTERS = {
    "TF_XLA_FLAGS": "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit --tf_xla_min_cluster_size=1",
    "TF_CPP_MIN_LOG_LEVEL": "0",
}


def job(ranks: int, **environment: str) -> Job:
    return run("tensorflow_xla", ranks, 300, **environment)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("check", checks("tensorflow_xla"))
def test_check(check: str, ranks: int) -> None:
    job(ranks).values(check)


def test_auto_clustering_has_the_same_bytes() -> None:
    clustered = [job(ranks, **CLUSTERS) for ranks in RANKS]
    digests = {d for found in (*clustered, *map(job, RANKS)) for d in found.values("check_step")}
    assert len(digests) == 1
    for found in clustered:
        assert "Compiled cluster using XLA" in found.output
