"""The figures of docs/cost_model.md: `python -m benchmarks.cost_model` prints its tables and draws its plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from hvd_syncbn.cli.cost_model import PER_NODE, Link, Point, hierarchical, packet_bytes, ring, step
from hvd_syncbn.cli.networks import NETWORKS

PLOT = Path(__file__).parents[1] / "docs" / "cost_model.png"
RANKS = [2**i for i in range(1, 11)]
GROUPS = (8, 32)


# Round numbers for hardware that was not measured.
ETHERNET = Link(300e-6, 25e-6, 1 / 2.5e9)  # Gloo over 25 Gb/s, cycle time 0.1 ms
INSIDE = Link(300e-6, 6e-6, 1 / 100e9)  # NCCL in a node
ACROSS = Link(0, 12e-6, 1 / 10e9)  # NCCL over 100 Gb/s, the second part of the hierarchical form


def networks_table() -> Table:
    """Return a table of the packets that networks send."""
    result = Table(title="Packets of one training step", title_justify="left")
    for column in ("network", "batch norms", "channels", "largest packet, kB", "all packets, MB"):
        result.add_column(column, justify="left" if column == "network" else "right")
    for name, channels in NETWORKS.items():
        sent = 2 * sum(map(packet_bytes, channels)) / 1e6
        result.add_row(name, str(len(channels)), str(sum(channels)), f"{packet_bytes(max(channels)) / 1e3:.0f}", f"{sent:.1f}")
    return result


def _grouped(group: int, ranks: int, size: float) -> float:
    return ring(min(ranks, group), size, ETHERNET)


def forms() -> list[tuple[str, Callable[[int, float], float]]]:
    """Return the forms of allreduce that the page compares, as functions of ranks and bytes to seconds."""
    return [
        ("ring, 25 Gb/s", lambda p, size: ring(p, size, ETHERNET)),
        (f"hierarchical, {PER_NODE} per node, 100 Gb/s", lambda p, size: hierarchical(p, size, INSIDE, ACROSS)),
        *((f"ring in groups of {group}", partial(_grouped, group)) for group in GROUPS),
    ]


def steps_table() -> Table:
    """Return a table of the milliseconds that synchronization adds to a step, by network."""
    result = Table(title="Milliseconds per step in packets", title_justify="left")
    result.add_column("network")
    result.add_column("form")
    for ranks in RANKS:
        result.add_column(str(ranks), justify="right")
    for name, channels in NETWORKS.items():
        for form, seconds in forms():
            cells = [f"{1e3 * step(channels, partial(seconds, p)):.0f}" for p in RANKS]
            result.add_row(name, form, *cells)
    return result


def check_table(points: Sequence[Point], link: Link) -> Table:
    """Return a table of the model and the measurements."""
    title = f"Cost model: wait {1e6 * link.wait:.0f} us, alpha {1e6 * link.alpha:.0f} us, beta {1e9 * link.beta:.2f} ns/B"
    result = Table(title=title, title_justify="left", caption="more ranks than cores wait for each other's time slices, too")
    for column in ("ranks", "packet, kB", "measured, ms", "model, ms", "model / measured"):
        result.add_column(column, justify="right")
    for ranks, size, seconds in points:
        model = ring(ranks, size, link)
        result.add_row(str(ranks), f"{size / 1e3:.3g}", f"{1e3 * seconds:.2f}", f"{1e3 * model:.2f}", f"{model / seconds:.2f}")
    return result


def plot(path: Path) -> None:
    """Plot step time against ranks, with a panel per network."""
    figure, axes = plt.subplots(1, len(NETWORKS), figsize=(4 * len(NETWORKS), 3.6), sharey=True, layout="constrained")
    for axis, (name, channels) in zip(axes, NETWORKS.items(), strict=True):
        for form, seconds in forms():
            axis.plot(RANKS, [1e3 * step(channels, partial(seconds, p)) for p in RANKS], label=form)
        axis.set(title=name, xlabel="ranks", xscale="log", yscale="log")
        axis.set_xticks(RANKS, map(str, RANKS), fontsize=7)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms per step in packets (model)")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """Print the tables of the page and draw its plot."""
    console = Console(width=160)
    console.print(networks_table())
    console.print(steps_table())
    plot(PLOT)
    console.print(f"Plot: {PLOT}")


if __name__ == "__main__":
    main()
