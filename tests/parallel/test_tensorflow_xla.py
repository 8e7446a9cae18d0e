"""XLA and exports on 1 and 2 ranks: what is refused, and that auto-clustering leaves the bytes alone."""

from __future__ import annotations

import pytest

from tests.parallel.job import checks, run

RANKS = (1, 2)
CLUSTERS = {
    "TF_XLA_FLAGS": "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit --tf_xla_min_cluster_size=1",
    "TF_CPP_MIN_LOG_LEVEL": "0",
}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("check", checks("tensorflow_xla"))
def test_check(check: str, ranks: int) -> None:
    run("tensorflow_xla", ranks).values(check)


def test_auto_clustering_has_the_same_bytes() -> None:
    clustered = [run("tensorflow_clustered", ranks, **CLUSTERS) for ranks in RANKS]
    plain = [run("tensorflow_clustered", ranks) for ranks in RANKS]
    assert len({digest for job in (*clustered, *plain) for digest in job.values("check_step")}) == 1
    for job in clustered:
        assert "Compiled cluster using XLA" in job.output
