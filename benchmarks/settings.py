"""Horovod's settings: the time of one packet under each, and of a training step with and without synchronized layers.

Over Gloo, and over MPI if Horovod is built with it. `hvd-syncbn doctor` and docs/performance.md use the results.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks import measure as m
from benchmarks.jobs import Outcome
from benchmarks.measure import Framework, FrameworkThatTrains, Record
from benchmarks.synchronized import NETWORK_IMAGES, NETWORK_SIZE
from hvd_syncbn import native
from hvd_syncbn.cli.doctor import WARM_MEMORY

# Packets of other layers wait for Horovod's cycle, ours do not (patch 0019); a short cycle is a fair comparison.
CYCLE_TIME = "0.1"  # ms
SHORT_CYCLE = {"HOROVOD_CYCLE_TIME": CYCLE_TIME}


class Setting(NamedTuple):
    """Environment variables, whether ranks are pinned to cores, and whether to measure a training step besides packets."""

    environment: dict[str, str]
    pin: bool = False
    training: bool = False
    controller: str = "gloo"


SETTINGS = {
    "default (cycle 1 ms)": Setting({}, training=True),
    "cycle 0.5 ms": Setting({"HOROVOD_CYCLE_TIME": "0.5"}),
    "cycle 0.1 ms": Setting(SHORT_CYCLE, training=True),
    "cycle 0.1 ms, no response cache": Setting(SHORT_CYCLE | {"HOROVOD_CACHE_CAPACITY": "0"}),
    "cycle 0.1 ms, no fusion": Setting(SHORT_CYCLE | {"HOROVOD_FUSION_THRESHOLD": "0"}),
    "cycle 0.1 ms, Horovod's threads pinned": Setting(SHORT_CYCLE | {"HOROVOD_THREAD_AFFINITY": "0,1"}),
    "cycle 0.1 ms, ranks pinned": Setting(SHORT_CYCLE, pin=True, training=True),
    "cycle 0.1 ms, warm memory": Setting(SHORT_CYCLE | WARM_MEMORY, training=True),
    "MPI (cycle 1 ms)": Setting({}, training=True, controller="mpi"),
    "MPI, cycle 0.1 ms": Setting(SHORT_CYCLE, training=True, controller="mpi"),
}

DEFAULTS = ("default (cycle 1 ms)", "MPI (cycle 1 ms)")
PACKET_CHANNELS = (8, 64, 256, 512, 2048, 16384)


def packets_case(rounds: int) -> dict[str, Any]:
    """Return a case with packets from those of the smallest layers to twice a large gradient bucket."""
    return {"kind": "packets", "channels": PACKET_CHANNELS, "rounds": rounds}


def training_case(rounds: int) -> dict[str, Any]:
    """Return a case with a network's training step."""
    return {"kind": "training", "images": NETWORK_IMAGES, "size": NETWORK_SIZE, "rounds": rounds}


def measure_packets(framework: Framework, channels: list[int], rounds: int) -> Record:
    """Return the times of allreduces of packets without a layer."""
    steps, errors = m.attempt({str(c): partial(framework.allreduce, native.packet_size(c)) for c in channels})
    return {"times": m.rounds(steps, errors, rounds, framework.barrier), "errors": errors}


def measure_training(framework: FrameworkThatTrains, images: int, size: int, rounds: int) -> Record:
    """Return the times of forward, backward and the optimizer's step, which averages all gradients.

    Measured with our layers and with local ones, which show the effect of a setting on the rest of the job.
    """
    steps, errors = m.attempt({name: partial(framework.training, name, images, size) for name in ("local", "ours")})
    return {"times": m.rounds(steps, errors, rounds, framework.barrier), "errors": errors}


def packet_rows(outcomes: list[Outcome]) -> list[Record]:
    """Return a row per job and packet: milliseconds of one allreduce."""
    return [
        {
            "setting": outcome.job.title,
            "ranks": outcome.job.ranks,
            "channels": int(channels),
            "bytes": 8 * native.packet_size(int(channels)),
            "ms": m.spread([1e3 * part for parts in times[channels] for part in parts]),
        }
        for outcome in outcomes
        for _, times, _, _ in outcome.of("packets")
        for channels in times
    ]


def training_rows(outcomes: list[Outcome]) -> list[Record]:
    """Return a row per setting."""
    return [
        {
            "setting": outcome.job.title,
            "ms": {name: m.spread([1e3 * seconds for seconds in m.total(times, name)]) for name in times},
            "added ms": m.spread([1e3 * (a - b) for a, b in zip(*(m.total(times, n) for n in ("ours", "local")), strict=True)]),
        }
        for outcome in outcomes
        for _, times, _, _ in outcome.of("training")
    ]


def table(packets: list[Record], training: list[Record]) -> Table:
    """Return a table with a row per setting."""
    result = Table(
        title="Horovod's settings, PyTorch, 2 ranks, Gloo unless noted: ms, median (quartiles)",
        title_justify="left",
        caption="steps: a ResNet-50's training step with the averaging of all gradients",
    )
    result.add_column("setting")
    for channels in PACKET_CHANNELS:
        result.add_column(f"packet, {8 * native.packet_size(channels) / 1000:.3g} kB", justify="right")
    for column in ("step, local layers", "step, ours", "added by ours"):
        result.add_column(column, justify="right")
    for setting in SETTINGS:
        mine = {r["channels"]: str(r["ms"]) for r in packets if r["setting"] == setting}
        if not mine:  # an MPI setting, and Horovod is built without MPI
            continue
        cells = [mine.get(channels, "") for channels in PACKET_CHANNELS]
        for row in (row for row in training if row["setting"] == setting):
            cells += [str(row["ms"]["local"]), str(row["ms"]["ours"]), str(row["added ms"])]
        result.add_row(setting, *cells)
    return result
