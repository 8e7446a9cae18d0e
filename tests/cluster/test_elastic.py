"""Elastic jobs: whatever dies, leaves or comes, all that live are back within 10 s, whatever Gloo's timeout.

The statistics at the end are those of one process that was given the same global batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import elastic
from tests.cluster.hosts import Hosts


def limit() -> float:
    """Seconds for a recovery: 10, and on a machine that has more to do than cores in proportion; Gloo's timeout is 600."""
    return 10 * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def assert_recovered(job: elastic.Job, deaths: int, survivors: int) -> None:
    """Everybody was back in time and finished, with the bytes of one process."""
    assert job.status == 0, job.output[-8000:]
    recoveries = job.recoveries()
    assert len(recoveries) == deaths, (recoveries, job.output[-8000:])
    seconds = [second for recovery in recoveries for second in recovery.values()]
    assert max(seconds, default=0) < limit(), (recoveries, job.output[-8000:])
    assert len(job.of("end")) == survivors, (job.of("end"), job.output[-8000:])
    assert "terminate called" not in job.output
    batches = job.batches()
    # Were all batches of one size, it would be one world all the time.
    assert len({len(batch) for batch in batches}) > 1
    assert job.result is not None and job.result["statistics"] == job.alone()


def wait_for_round(lines: Callable[[str], list[dict[str, Any]]], size: int, newest: int) -> int:
    """Wait until so many workers are in a round of the loop that is newer than `newest`; its number."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rounds = [line["round"] for line in lines("loop") if line["size"] == size and line["round"] > newest]
        if rounds and rounds.count(max(rounds)) == size:
            return int(max(rounds))
        time.sleep(0.1)
    raise AssertionError(f"no round of {size} workers: {lines('loop')}")


def death(worker: str, step: int, where: str, how: str) -> dict[str, Any]:
    return {"worker": worker, "step": step, "where": where, "how": how}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("framework", ["PyTorch", pytest.param("Keras", marks=pytest.mark.matrix)])
def test_twice_in_one_job(hosts: Hosts, tmp_path: Path, framework: str) -> None:
    """The first to die is rank 0, and the second has a neighbour on its host, which goes on."""
    plan = [death("rank 0", 3, "forward", "kill"), death("rank 1", 6, "backward", "raise")]
    job = elastic.run(hosts, tmp_path, {"h1": 2, "h2": 2}, plan, framework=framework)
    assert_recovered(job, deaths=2, survivors=2)
    # Groups were made again: two of two ranks, then each alone.
    assert job.result is not None and {len(ranks) for ranks in job.result["groups"]} == {2, 1}


@pytest.mark.timeout(300)
def test_hosts_come_and_go(hosts: Hosts, tmp_path: Path) -> None:
    """A host joins; another leaves, with its worker; then one dies."""

    def during(discover: Callable[[Mapping[str, int]], None], lines: Callable[[str], list[dict[str, Any]]]) -> None:
        newest = wait_for_round(lines, 2, 0)
        discover({"h1": 1, "h2": 1, "h3": 1})
        newest = wait_for_round(lines, 3, newest)
        discover({"h1": 1, "h3": 1})
        wait_for_round(lines, 2, newest)
        (tmp_path / "now").touch()

    plan = [death("h3:0", -1, "between", "kill")]
    job = elastic.run(hosts, tmp_path, {"h1": 1, "h2": 1}, plan, steps=1000, during=during, STEP_SECONDS="0.1")
    assert_recovered(job, deaths=1, survivors=1)
    assert "h2[0] has been removed from elastic job; this process ends." in job.output
    assert [line["size"] for line in job.of("end")] == [1]
