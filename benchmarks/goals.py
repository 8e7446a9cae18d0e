"""The performance goals of the layer: bounds, measured values, and whether each goal is met."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rich.table import Table

from benchmarks import kernels, latency, layer, settings, synchronized
from benchmarks import measure as m
from benchmarks.measure import Record


class Found(NamedTuple):
    """A measured value and the case it belongs to."""

    where: str
    value: float


class Goal(NamedTuple):
    """A lower (`at_least`) or upper bound for values."""

    text: str
    bound: float
    at_least: bool
    found: list[Found]

    def met(self, value: float) -> bool:
        """Return whether a value is within the bound."""
        return value >= self.bound if self.at_least else value <= self.bound


def _layer(
    rows: list[Record], framework: str, direction: str, shapes: Iterable[tuple[int, ...]], column: str, memory: str = "fresh"
) -> list[Found]:
    wanted = [list(shape) for shape in shapes]
    keys = (framework, direction, "float32", 1, memory)
    return [
        Found(f"{m.sizes(row['shape'])} {row['layout']}", row[column].middle)
        for row in rows
        if tuple(row[name] for name in ("framework", "direction", "dtype", "threads", "memory")) == keys
        and row["shape"] in wanted
        and column in row
    ]


def _packets(rows: list[Record]) -> list[Goal]:
    """Return the goals of a packet without a layer, with nothing set."""

    def where(row: Record) -> str:
        return f"{row['job']}, {row['bytes'] / 1e3:.3g} kB"

    one_host = [row for row in rows if latency.MEMORY in row["ms"] and latency.PACKET in row["ms"]]
    found = []
    for channels, goal in latency.GOALS.items():
        values = [Found(where(r), r["ms"][latency.PACKET].middle) for r in one_host if r["channels"] == channels]
        found.append(Goal(f"2 ranks: ms per packet of {channels} channels", goal, False, values))
    values = [Found(where(row), row["tail ms"][latency.PACKET]) for row in one_host]
    found.append(Goal("2 ranks: ms per packet, 99th percentile", latency.TAIL_GOAL, False, values))

    def times_bare(row: Record, bare: str, overhead: float) -> Found:
        return Found(where(row), max(0.0, row["ms"][latency.PACKET].middle - overhead) / row["ms"][bare].middle)

    values = [times_bare(row, latency.MEMORY, latency.OVERHEAD) for row in one_host]
    text = f"2 ranks: packet less {1e3 * latency.OVERHEAD:g} us, x bare exchange through shared memory"
    found.append(Goal(text, latency.BARE_GOAL, False, values))
    two_hosts = [row for row in rows if row["hosts"] > 1 and {latency.PACKET, latency.ROUND_TRIP} <= row["ms"].keys()]
    values = [times_bare(row, latency.ROUND_TRIP, 0.0) for row in two_hosts if row["channels"] == min(latency.CHANNELS)]
    found.append(Goal("2 hosts: smallest packet, x bare round trip over a socket", latency.BARE_GOAL, False, values))
    values = [Found(where(row), row["ms"][latency.PACKET].middle) for row in rows if row["ranks"] == 3]
    found.append(Goal("3 ranks: ms per packet", latency.SHARED_CORES_GOAL, False, values))
    values = [
        Found(where(row), row["ms"][latency.SET].middle / row["ms"][latency.PACKET].middle)
        for row in rows
        if {latency.SET, latency.PACKET} <= row["ms"].keys()
    ]
    found.append(Goal("4 ranks: packet of one of 4 process sets, x that of all ranks", latency.SETS_GOAL, False, values))
    return found


def goals(results: dict[str, list[Record]]) -> list[Goal]:
    """Return the goals for which this run has values."""
    rows = results["layer"]
    big, seven, flat = layer.BIG, layer.SHAPES[3:4], layer.SHAPES[6:7]
    found = []
    for direction, bound in (("forward", 3.0), ("backward", 2.0)):
        for memory in ("fresh", "warm"):
            for what, least, shapes in (("large images", bound, big), ("7x7", 1.2, seven), ("2-D", 1.2, flat)):
                values = _layer(rows, "torch", direction, shapes, "ratio", memory)
                found.append(Goal(f"{direction}, {what}, {memory} memory: x F.batch_norm", least, True, values))
        four = layer.SHAPES[:4]
        found.append(Goal(f"{direction}: x Keras layer", 3.0, True, _layer(rows, "tensorflow", direction, four, "ratio")))
        for framework, name in m.FRAMEWORKS.items():
            values = _layer(rows, framework, direction, big, "of copy")
            found.append(Goal(f"{direction}, large images, {name}: share of copy bandwidth", 0.6, True, values))
    for kernel in kernels.KERNELS:
        mine = [r for r in results["kernels"] if r["kernel"] == kernel and r["shape"] in [list(shape) for shape in big]]
        best = mine[-1]["path"] if mine else ""
        values = [Found(f"{m.sizes(r['shape'])} {r['layout']}", r["share"].middle) for r in mine if r["path"] == best]
        of = mine[0]["of"] if mine else ""
        found.append(Goal(f"{kernel} ({best}), large images: share of {of} speed", 0.85, True, values))
    for text, bound, shapes in (("large images", 0.05, big), ("7x7", 0.2, seven)):
        wanted = [list(shape) for shape in shapes]
        values = [Found(m.sizes(r["shape"]), r["share"].middle) for r in results["exact sums"] if r["shape"] in wanted]
        found.append(Goal(f"exact sums' share of the forward kernels, {text}", bound, False, values))
    for framework, name in m.FRAMEWORKS.items():
        two = [row for row in results["synchronized"] if (row["framework"], row["ranks"]) == (framework, 2)]
        values = [Found(f"{row['what']} over {row['over']}", row["of floor"].middle) for row in two if "of floor" in row]
        found.append(Goal(f"2 ranks, {name}: x (alone + one allreduce per direction)", 1.15, False, values))
        values = [
            Found(f"{m.label(framework, peer)}, {row['what']} over {row['over']}", row["ratio"][peer].middle)
            for row in two
            for peer in synchronized.PEERS
            if peer in row["ratio"]
        ]
        found.append(Goal(f"2 ranks, {name}: a peer's time, x ours", 1.0, True, values))
    found += _packets(results["latency"])
    values = [
        Found(f"{m.FRAMEWORKS[row['framework']]} over {row['over']}", row["ms"]["ours"].middle / row["ms"]["local"].middle)
        for row in results["network"]
        if {"ours", "local"} <= row["ms"].keys()
    ]
    found.append(Goal("2 ranks, ResNet-50 on small images: x local layers", 1.25, False, values))
    values = [
        Found(f"{m.FRAMEWORKS[row['framework']]} over {row['over']}", 1 / row["ratio"]["horovod"].middle)
        for row in results["network"]
        if "horovod" in row["ratio"]
    ]
    found.append(Goal("2 ranks, ResNet-50 on small images: x Horovod's own layers", 1.0, False, values))
    steps = {row["setting"]: row["ms"]["ours"].middle for row in results["training"] if row["setting"] in settings.DEFAULTS}
    if len(steps) == len(settings.DEFAULTS):
        gloo, mpi = (steps[name] for name in settings.DEFAULTS)
        found.append(Goal("2 ranks, ResNet-50's training step: x its time over MPI", 1.0, False, [Found("Gloo", gloo / mpi)]))
    values = [Found(r["direction"], r["overhead us"].middle) for r in results["overhead"] if r["framework"] == "torch"]
    found.append(Goal("PyTorch: us per call outside of the kernels", 40.0, False, values))
    values = [
        Found(r["contestant"], r["bytes"]["other tensors of its size"])
        for r in results["memory"]
        if r["contestant"].startswith("ours")
    ]
    found.append(Goal("bytes kept in other tensors of the input's size (with relu besides the output)", 0.0, False, values))
    ours = [r for r in results["accuracy"] if r["contestant"] == "ours" and "ulps" in r]
    for bound, most, means in ((1.0, "1e2", (0, 1e2)), (1.2, "1e4", (1e4,))):
        values = [Found(f"{m.FRAMEWORKS[r['framework']]}, mean {r['mean']:g}", r["ulps"]) for r in ours if r["mean"] in means]
        found.append(Goal(f"ulps from exact, 4 + 8 samples, mean up to {most} std", bound, False, values))
    values = [
        Found(f"{m.FRAMEWORKS[r['framework']]}, mean {r['mean']:g}", float(r["equals one process"]))
        for r in ours
        if "equals one process" in r
    ]
    found.append(Goal("bytes equal to those of one process (1: yes)", 1.0, True, values))
    return [goal for goal in found if goal.found]


def table(goals: list[Goal]) -> Table:
    """Return a table of goals with their best and worst values and the cases that miss them."""
    result = Table(title="Goals (float32, 1 thread)", title_justify="left", show_lines=True)
    for column in ("goal", "bound", "measured", "", "missed at"):
        result.add_column(column)
    for goal in goals:
        values = sorted(goal.found, key=lambda found: found.value, reverse=goal.at_least)
        missed = [found for found in values if not goal.met(found.value)]
        verdict = "[green]met[/]" if not missed else f"[red]not met[/] ({len(values) - len(missed)} of {len(values)})"
        best, worst = m.number(values[0].value), m.number(values[-1].value)
        result.add_row(
            goal.text,
            f"{'>=' if goal.at_least else '<='} {goal.bound:g}",
            best if best == worst else f"{best} to {worst}",
            verdict,
            "\n".join(f"{found.where}: {m.number(found.value)}" for found in reversed(missed)),
        )
    return result
