"""The plots of a run."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import accuracy, layer, synchronized
from benchmarks import measure as m
from benchmarks.measure import Record

COLORS = {
    "ours": "tab:cyan", "ours alone": "lightblue", "local": "dimgray", "copy": "lightgray", "allreduce": "lightgray",
    "one round": "tab:orange", "two rounds": "tab:red", "horovod": "tab:purple", "synchronized": "tab:olive",
    "allreduce, torch.distributed": "tan",
}  # fmt: skip


def draw(results: dict[str, list[Record]], folder: Path) -> list[Path]:
    """Draw every plot for which the run has figures and return their paths."""
    pictures = {"layer": _layer, "synchronized": _synchronized, "settings": _settings, "accuracy": _accuracy}
    paths = []
    for name, picture in pictures.items():
        figure = picture(results)
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=100)
            plt.close(figure)
    return paths


def _bars(axis: plt.Axes, groups: list[str], bars: dict[str, list[m.Spread | None]], labels: dict[str, str]) -> None:
    """Draw a bar per group and name, with its quartiles."""
    if not groups:  # the framework's job failed before
        axis.set_axis_off()
        return
    width = 0.85 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        there = [(j + i * width, value) for j, value in enumerate(values) if value is not None]
        if there:
            heights = [value.middle for _, value in there]
            spans = [[v.middle - v.low for _, v in there], [v.high - v.middle for _, v in there]]
            axis.bar([x for x, _ in there], heights, width, yerr=spans, color=COLORS[name], label=labels[name])
    axis.set_xticks(np.arange(len(groups)) + 0.425 - width / 2, groups, rotation=15, fontsize=8)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _layer(results: dict[str, list[Record]]) -> plt.Figure | None:
    keys = ("float32", 1, "fresh")
    rows = [r for r in results["layer"] if (r["dtype"], r["threads"], r["memory"]) == keys and "ratio" in r]
    if not rows:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(15, 9), sharey=True, layout="constrained")
    for column, framework in enumerate(m.FRAMEWORKS):
        for line, direction in zip(axes, layer.PASSES, strict=True):
            mine = [r for r in rows if (r["framework"], r["direction"]) == (framework, direction)]
            groups = [f"{m.sizes(r['shape'])}\n{r['layout']}" for r in mine]
            bars: dict[str, list[m.Spread | None]] = {name: [r["GB/s"][name] for r in mine] for name in ("ours", "local")}
            bars["copy"] = [r["copy GB/s"] for r in mine]
            _bars(line[column], groups, bars, {"ours": "ours", "local": m.label(framework, "local"), "copy": "copy"})
            line[column].set(title=f"{m.FRAMEWORKS[framework]}, {direction}, float32, 1 thread", ylabel="GB/s, minimum traffic")
    return figure


def _synchronized(results: dict[str, list[Record]]) -> plt.Figure | None:
    rows = results["synchronized"] + results["network"]
    panels = list(dict.fromkeys((row["ranks"], row["framework"]) for row in rows))
    if not panels:
        return None
    figure, axes = plt.subplots(len(panels), 1, figsize=(13, 3.4 * len(panels)), squeeze=False, layout="constrained")
    for axis, (ranks, framework) in zip(axes[:, 0], panels, strict=True):
        mine = [row for row in rows if (row["ranks"], row["framework"]) == (ranks, framework)]
        names = [name for name in synchronized.CONTESTANTS if any(name in row["ms"] for row in mine)]
        bars = {name: [row["ms"].get(name) for row in mine] for name in names}
        _bars(axis, [row["what"] for row in mine], bars, {name: m.label(framework, name) for name in names})
        axis.set(title=f"{m.FRAMEWORKS[framework]}, {ranks} ranks, forward and backward", ylabel="ms", yscale="log")
    return figure


def _settings(results: dict[str, list[Record]]) -> plt.Figure | None:
    rows = results["training"]
    if not rows:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    settings = [row["setting"] for row in rows]
    channels = 64
    packets = {r["setting"]: r["ms"] for r in results["packets"] if r["channels"] == channels}
    _bars(axes[0], settings, {"allreduce": [packets.get(s) for s in settings]}, {"allreduce": f"packet of {channels} channels"})
    bars = {name: [row["ms"][name] for row in rows] for name in ("local", "ours")}
    _bars(axes[1], settings, bars, {"local": "with local layers", "ours": "with ours"})
    axes[0].set(title="One packet, 2 ranks", ylabel="ms")
    axes[1].set(title="Training step of a ResNet-50, 2 ranks", ylabel="ms")
    return figure


def _accuracy(results: dict[str, list[Record]]) -> plt.Figure | None:
    rows = [row for row in results["accuracy"] if "error" in row]
    if not rows:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), sharey=True, layout="constrained")
    for axis, framework in zip(axes, m.FRAMEWORKS, strict=True):
        if not any(row["framework"] == framework for row in rows):
            axis.set_axis_off()
            continue
        for name in dict.fromkeys(row["contestant"] for row in rows if row["framework"] == framework):
            errors = {r["mean"]: r["error"] for r in rows if (r["framework"], r["contestant"]) == (framework, name)}
            values = [errors.get(mean, np.nan) for mean in accuracy.MEANS]
            axis.plot(range(len(values)), values, "o-", color=COLORS[name], label=m.label(framework, name))
        axis.set_xticks(range(len(accuracy.MEANS)), [f"{mean:g}" for mean in accuracy.MEANS])
        axis.set(title=m.FRAMEWORKS[framework], xlabel="mean / std", ylabel="largest output error", yscale="log")
        axis.legend(fontsize=7, title="not drawn: NaN", title_fontsize=7)
    return figure
