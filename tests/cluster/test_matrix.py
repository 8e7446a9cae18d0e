"""Every way to die, at every number of ranks, in both frameworks: `make test-cluster` writes the table out/elastic.md."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import elastic
from tests.cluster.hosts import Hosts
from tests.cluster.test_elastic import assert_recovered, death, wait_for_round

SLOTS = {2: {"h1": 1, "h2": 1}, 3: {"h1": 1, "h2": 2}, 4: {"h1": 2, "h2": 2}}
PLACES = ("forward", "backward", "between")
CASES = list(itertools.product(SLOTS, PLACES, ("kill", "raise")))
HEADER = "ranks", "what happens in the job, one after the other", "survivors back", *elastic.MODULES


class Table:
    """Rows, and how many faults were tried and survived; in the file after every job, for a run that is cut short."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], dict[str, str]] = {}
        self.tried, self.survived = Counter[str](), Counter[str]()

    def add(self, framework: str, ranks: int, faults: list[str], back: list[str], seconds: list[float], good: bool) -> None:
        """A job: in its row seconds until all survivors were back, fault by fault, and the machine's load; NO if it failed."""
        self.tried[framework] += len(faults)
        self.survived[framework] += len(faults) * good
        said = f"{'' if good else 'NO: '}{', '.join(f'{each:.1f}' for each in seconds)} ({os.getloadavg()[0]:.0f})"
        self.rows.setdefault((str(ranks), "; ".join(faults), ", ".join(back)), {})[framework] = said
        total = "; ".join(f"{name}: {self.survived[name]} of {tried} faults survived" for name, tried in self.tried.items())
        cells = [HEADER, ["---"] * len(HEADER)]
        cells += [(*row, *(found.get(name, "") for name in elastic.MODULES)) for row, found in self.rows.items()]
        lines = [time.strftime("%Y-%m-%d"), "", *(f"| {' | '.join(row)} |" for row in cells), "", total]
        path = Path(__file__).parents[2] / "out/elastic.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    yield Table()


@pytest.mark.matrix
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("ranks", "where", "how"), CASES)
@pytest.mark.parametrize("framework", elastic.MODULES)
def test_recovers(hosts: Hosts, tmp_path: Path, table: Table, framework: str, ranks: int, where: str, how: str) -> None:
    number = CASES.index((ranks, where, how))
    plan = [death(f"rank {number % ranks}", 4, where, how)]
    if ranks > 2:  # somebody has to be left
        other = PLACES[(PLACES.index(where) + 1) % 3]
        plan.append(death(f"rank {number % (ranks - 1)}", 8, other, how))
    job = elastic.run(hosts, tmp_path, SLOTS[ranks], plan, framework=framework)
    good = False
    try:
        assert_recovered(job, deaths=len(plan), survivors=ranks - len(plan))
        good = True
    finally:
        recoveries = job.recoveries()
        back = [f"{sum(s < float('inf') for s in each.values())} of {len(each)}" for each in recoveries]
        faults = [f"{'SIGKILL' if how == 'kill' else 'exception'}, {each['where']}" for each in plan]
        seconds = [max(each.values(), default=0) for each in recoveries]
        table.add(framework, ranks, faults, back, seconds, good)


@pytest.mark.matrix
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", SLOTS)
@pytest.mark.parametrize("framework", elastic.MODULES)
def test_hosts_join_and_leave(hosts: Hosts, tmp_path: Path, table: Table, framework: str, ranks: int) -> None:
    """Up to this number of ranks, and down to one. A host's seconds are until all are in the loop, with those that start."""
    start = {"h1": 1, "h2": 1}
    if ranks == 2:
        steps = [("a host leaves", {"h1": 1}), ("a host joins", {"h1": 1, "h3": 1})]
    else:
        steps = [("a host joins", {**start, "h3": ranks - 2}), ("a host leaves", {"h1": 1, "h3": ranks - 2})]
    steps.append(("a host leaves", {"h1": 1}))
    seconds: list[float] = []

    def during(discover: Callable[[Mapping[str, int]], None], lines: Callable[[str], list[dict[str, Any]]]) -> None:
        newest = wait_for_round(lines, len(start), 0)
        for _, slots in steps:
            changed = time.time()
            discover(slots)
            newest = wait_for_round(lines, sum(slots.values()), newest)
            seconds.append(max(line["time"] for line in lines("loop") if line["round"] == newest) - changed)
        (tmp_path / "now").touch()

    job = elastic.run(hosts, tmp_path, start, framework=framework, steps=1000, during=during, STEP_SECONDS="0.1")
    good = False
    try:
        assert_recovered(job, deaths=0, survivors=1)
        good = True
    finally:
        sizes = [sum(slots.values()) for _, slots in steps]
        faults = [f"{what}: {size}" for (what, _), size in zip(steps, sizes, strict=True)]
        back = [f"{size} of {size}" for size in sizes[: len(seconds)]]
        table.add(framework, ranks, faults, back, seconds, good)


@pytest.mark.matrix
@pytest.mark.timeout(400)
@pytest.mark.parametrize("framework", elastic.MODULES)
def test_a_slot_comes_back(hosts: Hosts, tmp_path: Path, table: Table, framework: str) -> None:
    """With a worker of its own, after the cooldown. Its seconds are until both are in the loop."""
    plan = [death("rank 1", 4, "forward", "kill")]
    options = ("--blacklist-cooldown-range", "2", "4")
    job = elastic.run(hosts, tmp_path, SLOTS[2], plan, framework=framework, steps=120, options=options, STEP_SECONDS="0.1")
    loops = job.of("loop")
    good = False
    try:
        assert_recovered(job, deaths=1, survivors=2)
        assert [line["size"] for line in loops] == [2, 2, 1, 2, 2]
        good = True
    finally:
        died = [line["time"] for line in job.of("dies")]
        back = f"{len({line['pid'] for line in job.of('end')})} of 2"
        seconds = [loops[-1]["time"] - died[0]] if died else []
        table.add(framework, 2, ["SIGKILL, forward; its slot comes back"], [back], seconds, good)
