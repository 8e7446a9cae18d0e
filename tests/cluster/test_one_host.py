"""Elastic jobs that begin on one host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import elastic
from tests.cluster.hosts import Hosts
from tests.cluster.test_elastic import assert_recovered, death, wait_for_round


@pytest.mark.timeout(300)
def test_a_job_on_one_host_grows(hosts: Hosts, tmp_path: Path) -> None:
    """Its interface is named, so it does not wait for a second host; one joins, and dies."""

    def during(discover: Callable[[Mapping[str, int]], None], lines: Callable[[str], list[dict[str, Any]]]) -> None:
        newest = wait_for_round(lines, 1, 0)
        discover({"h1": 1, "h2": 1})
        wait_for_round(lines, 2, newest)
        (tmp_path / "now").touch()

    plan = [death("h2:0", -1, "between", "kill")]
    job = elastic.run(hosts, tmp_path, {"h1": 1}, plan, steps=1000, during=during, STEP_SECONDS="0.1")
    assert_recovered(job, deaths=1, survivors=1)
