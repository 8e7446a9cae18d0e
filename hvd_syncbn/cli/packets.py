"""What packets cost between the ranks of a cluster, and what follows for a training step: ``hvd-syncbn doctor -np``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from hvd_syncbn.cli import job
from hvd_syncbn.cli.cost_model import Link, fit, ring, step
from hvd_syncbn.cli.networks import NETWORKS

ENOUGH_RANKS = 8
"""In a group: batch norm's regular setting is some 32 images per statistic, and who synchronizes has 4 or fewer per rank."""

WORTH_IT = 1.5
"""How much longer the packets of all ranks have to take than a group's, before a group is advised."""


class Packet(NamedTuple):
    """One measured allreduce: ``seconds`` on the slowest rank, in ``groups`` groups of ``size`` ranks at once, each over up to
    ``spans`` hosts; of neighbours, or else of one rank from every host."""

    size: int
    groups: int
    neighbours: bool
    spans: int
    bytes: int
    seconds: float


class Cluster(NamedTuple):
    """What was measured: the host of every rank, what carries the packets, whether Horovod has MPI."""

    hosts: list[str]
    controller: str
    mpi_built: bool
    packets: list[Packet]

    @property
    def links(self) -> dict[bool, Link]:
        """The cost model's numbers, of groups across hosts (True) and inside one (False), as far as measured."""
        points: dict[bool, list[tuple[int, float, float]]] = {}
        for packet in self.packets:
            points.setdefault(packet.spans > 1, []).append((packet.size, packet.bytes, packet.seconds))
        return {across: fit(measured) for across, measured in points.items()}

    def model(self, packet: Packet) -> float:
        """Seconds by the cost model."""
        return ring(packet.size, packet.bytes, self.links[packet.spans > 1])

    def steps(self) -> dict[str, dict[int, float]]:
        """Network -> group size -> seconds per training step in packets."""
        links = self.links
        spans = {packet.size: packet.spans for packet in self.packets if packet.neighbours}

        def seconds(size: int, data: float) -> float:
            return ring(size, data, links[spans[size] > 1])

        return {
            name: {size: step(channels, partial(seconds, size)) for size in sorted(spans)}
            for name, channels in NETWORKS.items()
        }

    def group_size(self) -> int | None:
        """The group size to take; None for all ranks."""
        return group_size(self.steps()["ResNet-50"])


def group_size(steps: dict[int, float]) -> int | None:
    """The smallest group that has ``ENOUGH_RANKS`` and is ``WORTH_IT``; None for all ranks.

    Args:
        steps: group size -> seconds of a step; the largest size is that of all ranks.
    """
    for size, seconds in sorted(steps.items())[:-1]:
        if size >= ENOUGH_RANKS and steps[max(steps)] > WORTH_IT * seconds:
            return size
    return None


def measure(framework: str, hosts: Sequence[job.Host], limit: float, note: Callable[[str], None] = lambda _: None) -> Cluster:
    """Measures packets of three sizes between the ranks: all together, and in groups of fewer.

    Args:
        framework: whose Horovod.
        hosts: what ``job.place`` returns.
        limit: seconds for either of the two jobs.
        note: told what goes on.

    Raises:
        job.JobError: a job did not finish.
    """
    ranks = sum(host.slots for host in hosts)
    about: job.Report = {}
    packets: list[Packet] = []

    def take(report: job.Report) -> None:
        if "hosts" in report:
            about.update(report)
        elif "seconds" in report:
            packets.append(Packet(**report))
            note(f"packet of {packets[-1].bytes / 1e3:.0f} kB among {packets[-1].size} ranks")

    note(f"starting {ranks} ranks")
    job.run("packets", framework, list(hosts), limit=limit, report=take)
    if ranks > 2:
        note("starting groups of ranks")
        # A job of its own: process sets that may come while it runs cost every cycle an agreement.
        environment = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
        job.run("grouped packets", framework, list(hosts), limit=limit, report=take, environment=environment)
    packets.sort(key=lambda packet: (packet.size, not packet.neighbours, packet.bytes))
    return Cluster(about["hosts"], about["controller"], about["mpi_built"], packets)
