"""Every way to die, at every number of ranks: `make test-cluster` writes the table that docs/cluster.md shows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import elastic
from tests.cluster.hosts import Hosts
from tests.cluster.test_elastic import assert_recovered, death

SLOTS = {2: {"h1": 1, "h2": 1}, 3: {"h1": 1, "h2": 2}, 4: {"h1": 2, "h2": 2}}
PLACES = ("forward", "backward", "between")
CASES = list(itertools.product(SLOTS, PLACES, ("kill", "raise")))
HEADER = (
    "| ranks | first death | second death | survivors back | slowest, s | bytes of one process |",
    "|---|---|---|---|---|---|",
)


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    path = Path(__file__).parents[2] / "out/elastic.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join((time.strftime("%Y-%m-%d"), "", *HEADER, *rows)) + "\n")


@pytest.mark.matrix
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ranks", "where", "how"), CASES)
def test_recovers(hosts: Hosts, tmp_path: Path, table: list[str], ranks: int, where: str, how: str) -> None:
    number = CASES.index((ranks, where, how))
    plan = [death(f"rank {number % ranks}", 4, where, how)]
    if ranks > 2:  # somebody has to be left
        other = PLACES[(PLACES.index(where) + 1) % 3]
        plan.append(death(f"rank {number % (ranks - 1)}", 8, other, how))
    job = elastic.run(hosts, tmp_path, SLOTS[ranks], plan)
    seconds = assert_recovered(job, deaths=len(plan), survivors=ranks - len(plan))
    deaths = [f"rank {number % (ranks - i)}, {each['where']}, {each['how']}" for i, each in enumerate(plan)]
    second = deaths[1] if len(deaths) > 1 else ""
    table.append(f"| {ranks} | {deaths[0]} | {second} | {len(seconds)} of {len(seconds)} | {max(seconds):.1f} | yes |")
