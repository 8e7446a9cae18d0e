"""Run one training job in three ways from one seed, in PyTorch and in Keras: `make demo`.

1. One process with the global batch of 4 images.
2. Two ranks with 2 images each and synchronized batch norm.
3. Two ranks with 2 images each and plain batch norm: each rank normalizes its own 2 images.

Prints one table and one sha256, and writes out/demo.png.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

import matplotlib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
OUT = HERE.parent / "out"
EPOCHS = 3
FRAMEWORKS = {"torch": "PyTorch", "keras": "Keras"}
TIME_LIMIT = 600  # seconds per run
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Way:
    """One way to run the job."""

    label: str
    ranks: int
    layer: str
    style: tuple[str, str, int]  # color, line style and line width in the plot


WAYS = (
    Way("1 process x 4", 1, "sync", ("black", "-", 5)),
    Way("2 ranks x 2, hvd-syncbn", 2, "sync", ("tab:cyan", "-", 2)),
    Way("2 ranks x 2, plain norms", 2, "local", ("tab:red", "--", 2)),
)

console = Console(highlight=False)


def train(framework: str, way: Way, progress: Progress) -> list[tuple[float, float]]:
    """Run one way as a user would. Return the training loss and the test accuracy of each epoch."""
    command = [sys.executable, str(HERE / f"digits_{framework}.py"), "--layer", way.layer, "--epochs", str(EPOCHS)]
    if way.ranks > 1:
        # As many slots as ranks: horovodrun starts one process per slot.
        command = ["horovodrun", "--gloo", "-np", str(way.ranks), "-H", f"localhost:{way.ranks}", *command]
    bar = progress.add_task(f"{FRAMEWORKS[framework]:7}  {way.label:25}  starting", total=EPOCHS)
    lines, epochs = [], []
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        limit = Timer(TIME_LIMIT, process.terminate)
        limit.start()
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"epoch \d+/\d+ loss ([\d.]+) accuracy ([\d.]+)", line):
                epochs.append((float(found[1]), float(found[2])))
                text = f"{FRAMEWORKS[framework]:7}  {way.label:25}  accuracy {epochs[-1][1]:.3f}"
                progress.update(bar, description=text, completed=len(epochs))
        limit.cancel()
    if process.returncode != 0 or len(epochs) != EPOCHS:
        progress.stop()
        console.print("".join(lines[-40:]), markup=False)
        sys.exit(f"{' '.join(command)} failed with exit status {process.returncode}")
    return epochs


def verify(progress: Progress) -> tuple[bool, str]:
    """Return whether one step has the same bytes in both frameworks and for every split over 2 ranks, and a message."""
    bar = progress.add_task("Bytes of one step, both frameworks, 2 ranks", total=1)
    command = [sys.executable, "-m", "hvd_syncbn.cli", "verify", "-np", "2", "--json"]
    result = subprocess.run(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=TIME_LIMIT)
    progress.advance(bar)
    found = json.loads(result.stdout)
    count = len(found["results"])
    if found["equal"]:
        return True, f"One sha256 over {count} ways to run a training step and the reference: {found['reference'][:16]}..."
    return False, "The bytes differ. Run `hvd-syncbn verify -np 2` to see where."


def show(runs: dict[str, list[list[tuple[float, float]]]]) -> None:
    """Print losses and accuracies, one row per way."""
    table = Table(title=f"After {EPOCHS} epochs", title_justify="left")
    table.add_column("images per step")
    for framework in runs:
        table.add_column(f"{FRAMEWORKS[framework]} loss", justify="right")
        table.add_column("accuracy", justify="right", style="bold")
    for index, way in enumerate(WAYS):
        last = [results[index][-1] for results in runs.values()]
        table.add_row(way.label, *(text for loss, accuracy in last for text in (f"{loss:.3f}", f"{accuracy:.1%}")))
    console.print(table)


def plot(runs: dict[str, list[list[tuple[float, float]]]], path: Path) -> None:
    """Draw loss and accuracy per epoch of every run."""
    figure, axes = plt.subplots(2, len(runs), figsize=(5 * len(runs), 7), squeeze=False, layout="constrained")
    epochs = np.arange(1, EPOCHS + 1)
    for column, (framework, results) in enumerate(runs.items()):
        for way, result in zip(WAYS, results, strict=True):
            color, line, width = way.style
            for row, values in enumerate(zip(*result, strict=True)):
                axes[row, column].plot(epochs, values, line, color=color, linewidth=width, label=way.label)
        axes[0, column].set(title=FRAMEWORKS[framework], ylabel="training loss", xticks=epochs)
        axes[1, column].set(xlabel="epoch", ylabel="test accuracy", xticks=epochs)
        axes[0, column].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run all jobs, then print the table and write the plot."""
    OUT.mkdir(exist_ok=True)
    console.print("Training a small network on handwritten digits, with a global batch of 4 images.")
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=12), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        runs = {framework: [train(framework, way, progress) for way in WAYS] for framework in FRAMEWORKS}
        equal, hashes = verify(progress)
    picture = OUT / "demo.png"
    plot(runs, picture)
    show(runs)
    console.print("With plain batch norm on 2 images the network learns less, because the statistics of 2 images are noise.")
    console.print("With hvd-syncbn the 4 images of both ranks are normalized together, and it learns as in one process.")
    console.print(hashes, style=None if equal else "red")
    console.print(f"Curves: {picture}", soft_wrap=True)
    sys.exit(not equal)


if __name__ == "__main__":
    main()
