"""Measures the packets between the ranks of a cluster and predicts their cost in a training step: ``hvd-syncbn doctor -np``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from hvd_syncbn.cli import job
from hvd_syncbn.cli.cost_model import Link, fit, ring, step
from hvd_syncbn.cli.networks import NETWORKS

ENOUGH_RANKS = 8
"""Ranks of a group: batch norm usually has about 32 images per statistic, and jobs that synchronize have up to 4 per rank."""

WORTH_IT = 1.5
"""A group is recommended if the packets of all ranks take more than this many times as long as the group's."""


class Packet(NamedTuple):
    """One measured allreduce, in ``groups`` groups of ``size`` ranks at once: ``seconds`` on the slowest rank.

    Each group spans up to ``spans`` hosts. It has consecutive ranks, or else one rank from every host.
    """

    size: int
    groups: int
    neighbours: bool
    spans: int
    bytes: int
    seconds: float


DISTRIBUTED = "Gloo of torch.distributed"
"""What sums packets under torchrun, as ``Cluster.controller``."""

STAGES = ("call", "cycle", "agreement", "sum", "return")
"""The stages of an allreduce, one after the other: until it is enqueued, until the cycle begins that runs it, until the ranks
have agreed on it, until it is summed, and until the caller has the result."""


class Breakdown(NamedTuple):
    """The seconds of a packet's stages among all ranks: stage -> [median, 99th percentile] over the packets of every rank.

    ``ran_by_caller`` is the share of packets that the waiting thread ran itself.
    """

    bytes: int
    stages: dict[str, list[float]]
    ran_by_caller: float

    def slowest(self) -> str:
        """Return the stage with the largest median."""
        return max(self.stages, key=lambda stage: self.stages[stage][0])


class Cluster(NamedTuple):
    """All measurements, with the host of every rank and what sums them: Gloo, MPI, or Gloo of torch.distributed."""

    hosts: list[str]
    controller: str
    packets: list[Packet]
    breakdowns: list[Breakdown]

    @property
    def links(self) -> dict[bool, Link]:
        """The cost model's parameters for groups across hosts (True) and inside a host (False), if measured."""
        points: dict[bool, list[tuple[int, float, float]]] = {}
        for packet in self.packets:
            points.setdefault(packet.spans > 1, []).append((packet.size, packet.bytes, packet.seconds))
        return {across: fit(measured) for across, measured in points.items()}

    def model(self, packet: Packet) -> float:
        """Return the seconds that the cost model predicts for a packet."""
        return ring(packet.size, packet.bytes, self.links[packet.spans > 1])

    def steps(self) -> dict[str, dict[int, float]]:
        """Return for each network and group size the seconds that packets take in a training step."""
        links = self.links
        spans = {packet.size: packet.spans for packet in self.packets if packet.neighbours}

        def seconds(size: int, data: float) -> float:
            return ring(size, data, links[spans[size] > 1])

        return {
            name: {size: step(channels, partial(seconds, size)) for size in sorted(spans)}
            for name, channels in NETWORKS.items()
        }

    def group_size(self) -> int | None:
        """Return the recommended group size; None for all ranks."""
        return group_size(self.steps()["ResNet-50"])


def group_size(steps: dict[int, float]) -> int | None:
    """Return the smallest group size that has ``ENOUGH_RANKS`` and is ``WORTH_IT``; None for all ranks.

    Args:
        steps: group size -> seconds of a step; the largest size is that of all ranks.
    """
    for size, seconds in sorted(steps.items())[:-1]:
        if size >= ENOUGH_RANKS and steps[max(steps)] > WORTH_IT * seconds:
            return size
    return None


def advice(cluster: Cluster, breakdown: Breakdown) -> str:
    """Return what the slowest stage of a packet consists of, and what makes it faster."""
    stage = breakdown.slowest()
    if stage == "call":
        return "the framework's call until the packet is enqueued. No setting of Horovod changes it."
    if stage in ("cycle", "return") and breakdown.ran_by_caller < 0.5:
        return (
            "Horovod's thread runs the cycle, so that two threads have to be woken. The waiting thread runs it itself only "
            "over Gloo without GPU operations: start with horovodrun --gloo, and unset HOROVOD_AUTOTUNE."
        )
    if stage == "cycle":
        return "another cycle was running when the packet was enqueued. Other collectives at the same time cause this."
    if stage == "return":
        return "the framework's code after the callback. No setting of Horovod changes it."
    if stage == "sum":
        return "the sum over the ranks. It takes less time in smaller groups (process_set=groups(n).mine)."
    wait = "the ranks wait for the slowest one. Give each rank a core to spare, and do not pin it to one core"
    if len(set(cluster.hosts)) == 1:
        return f"{wait}."
    return f"{wait}; between hosts a message and its answer take at least the time that ping shows."


def measure(
    framework: str,
    hosts: Sequence[job.Host],
    limit: float,
    note: Callable[[str], None] = lambda _: None,
    launcher: str = "horovodrun",
) -> Cluster:
    """Measure packets of three sizes among all ranks and among smaller groups.

    Args:
        framework: the framework that the ranks use.
        hosts: the result of ``job.place``.
        limit: time limit of each of the two jobs in seconds.
        note: called with a description of each step.
        launcher: ``"horovodrun"``, or ``"torchrun"`` for PyTorch's ranks on this host.

    Raises:
        job.JobError: a job did not finish.
    """
    ranks = sum(host.slots for host in hosts)
    about: job.Report = {}
    packets: list[Packet] = []
    breakdowns: list[Breakdown] = []

    def take(report: job.Report) -> None:
        if "hosts" in report:
            about.update(report)
        elif "seconds" in report:
            packets.append(Packet(**report))
            note(f"packet of {packets[-1].bytes / 1e3:.0f} kB among {packets[-1].size} ranks")
        elif "stages" in report:
            breakdowns.append(Breakdown(**report))

    note(f"starting {ranks} ranks")
    job.run("packets", framework, list(hosts), limit=limit, launcher=launcher, report=take)
    if ranks > 2:
        note("starting groups of ranks")
        # In a separate job, because dynamic process sets add a negotiation to every cycle.
        dynamic = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
        job.run("grouped packets", framework, list(hosts), limit=limit, launcher=launcher, report=take, environment=dynamic)
    packets.sort(key=lambda packet: (packet.size, not packet.neighbours, packet.bytes))
    return Cluster(about["hosts"], about["controller"], packets, breakdowns)
