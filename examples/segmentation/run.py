"""Segment photographs at one image per rank with local and with synchronized norms, in both frameworks: `make segmentation`.

Prints a table, and writes curves and predictions to out/segmentation.png.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import photos
from matplotlib.colors import ListedColormap
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
OUT = HERE.parent.parent / "out"
FRAMEWORKS = {"torch": "PyTorch", "keras": "Keras"}
LAYERS = {"local": "local", "sync": "synchronized"}
RANKS = (2, 4)
TIME_LIMIT = 600  # seconds per run

Results = dict[tuple[str, int, str], dict[str, photos.Array]]
console = Console()


def train(framework: str, ranks: int, layer: str) -> dict[str, photos.Array]:
    """Run one job as a user would; return its scores and predictions."""
    path = OUT / f"segmentation_{framework}_{ranks}_{layer}.npz"
    path.unlink(missing_ok=True)
    horovodrun = str(Path(sys.executable).parent / "horovodrun")
    program = [sys.executable, str(HERE / f"with_{framework}.py"), "--layer", layer, "--out", str(path)]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_NUM_INTEROP_THREADS": "2",
    }
    console.print(f"[bold]{FRAMEWORKS[framework]}[/bold], {ranks} ranks, {LAYERS[layer]}")
    start = time.monotonic()
    done = subprocess.run(
        [horovodrun, "--gloo", "-np", str(ranks), "-H", f"localhost:{ranks}", *program],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=TIME_LIMIT,
    )  # fmt: skip
    if done.returncode != 0 or not path.exists():
        console.print(done.stdout[-6000:], markup=False, highlight=False)
        sys.exit(f"{' '.join(program)} failed with exit status {done.returncode}")
    last = [line[line.index("step ") :] for line in done.stdout.splitlines() if "mean IoU" in line][-1]
    console.print(f"    {last} ({time.monotonic() - start:.0f} s)", highlight=False)
    with np.load(path) as data:
        return dict(data)


def table(results: Results) -> Table:
    """Return a table of the scores after the last step."""
    found = Table(title="Test strips after the last step: intersection over union, and pixel accuracy", title_justify="left")
    for column in ("", "ranks", "norms"):
        found.add_column(column)
    for column in (*photos.CLASSES, "mean", "pixels"):
        found.add_column(column, justify="right")
    for (framework, ranks, layer), result in results.items():
        scores = [*result["iou"][-1], result["iou"][-1].mean(), result["accuracy"][-1]]
        found.add_row(FRAMEWORKS[framework], str(ranks), LAYERS[layer], *(f"{score:.3f}" for score in scores))
    return found


def _joined(strips: list[photos.Array]) -> list[photos.Array]:
    """Return the strips of each photograph side by side."""
    half = len(strips) // 2
    return [np.concatenate(strips[:half], 1), np.concatenate(strips[half:], 1)]


def plot(results: Results, path: Path) -> None:
    """Draw the curves, and below them the test strips with their labels and predictions."""
    plt.switch_backend("Agg")
    _, test = photos.load()
    figure = plt.figure(figsize=(12, 10), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    steps = np.arange(1, photos.STEPS // photos.ROUND + 1) * photos.ROUND
    for axis, (framework, name) in zip(above.subplots(1, 2, sharey=True), FRAMEWORKS.items(), strict=True):
        for (of, ranks, layer), result in results.items():
            if of == framework:
                color, line = {"local": "tab:red", "sync": "tab:cyan"}[layer], {2: "--", 4: "-"}[ranks]
                axis.plot(steps, result["iou"].mean(-1), line, color=color, label=f"{ranks} ranks, {LAYERS[layer]}")
        axis.set(title=name, xlabel="step", ylabel="mean IoU of the test strips")
        axis.legend()
    pictures = {"photograph": _joined([gray[..., 0] for gray, _ in test]), "labels": _joined([classes for _, classes in test])}
    for framework, name in FRAMEWORKS.items():
        for layer, what in LAYERS.items():
            pictures[f"{name}, 4 ranks,\n{what}"] = _joined(list(results[framework, 4, layer]["predictions"]))
    colors = ListedColormap(["#bbdefb", "#2e7d32", "#ef6c00"])
    grid = below.subplots(2, len(pictures))
    for column, (title, joined) in enumerate(pictures.items()):
        for axis, picture in zip(grid[:, column], joined, strict=True):
            axis.axis("off")
            if title == "photograph":
                axis.imshow(picture, cmap="gray")
            else:
                axis.imshow(picture, cmap=colors, vmin=0, vmax=len(photos.CLASSES) - 1, interpolation="nearest")
        grid[0, column].set_title(title, fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """Run all jobs, then print the table and write the plot."""
    OUT.mkdir(exist_ok=True)
    ways = [(framework, ranks, layer) for framework in FRAMEWORKS for ranks in RANKS for layer in LAYERS]
    results = {way: train(*way) for way in ways}
    console.print(table(results))
    plot(results, OUT / "segmentation.png")
    console.print(f"Plot: {OUT / 'segmentation.png'}")


if __name__ == "__main__":
    main()
