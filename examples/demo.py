"""`make demo`: the main job, three ways from one seed, in PyTorch and in Keras.

(a) one process with the global batch of 4 images
(b) two ranks with 2 images each, every rank normalising its own (what happens without this project)
(c) two ranks with 2 images each and synchronized batch normalization

What to see: (c) lies on (a), (b) does not. Results go to out/.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
OUT = HERE.parent / "out"
EPOCHS = 4
FRAMEWORKS = {"torch": "PyTorch", "keras": "Keras"}
WAYS = {
    "a": ("1 process x 4 images", 1, "sync"),
    "b": ("2 ranks x 2, plain batch norm", 2, "local"),
    "c": ("2 ranks x 2, hvd-syncbn", 2, "sync"),
}
TIME_LIMIT = 600  # seconds per run

console = Console()


@dataclass
class Run:
    """What one way of training gave."""

    losses: np.ndarray
    accuracies: np.ndarray
    weights: np.ndarray
    parts: dict[str, np.ndarray]


def train(framework: str, way: str) -> Run:
    """Runs one way as a user would, printing its progress."""
    label, ranks, layer = WAYS[way]
    path = OUT / f"{framework}_{way}.npz"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"digits_{framework}.py")]
    if ranks > 1:
        horovodrun = str(Path(sys.executable).parent / "horovodrun")
        # As many slots as ranks: horovodrun starts one process per slot.
        command = [horovodrun, "--gloo", "-np", str(ranks), "-H", f"localhost:{ranks}", *command]
    command += ["--layer", layer, "--epochs", str(EPOCHS), "--out", str(path)]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    console.print(f"[bold]{FRAMEWORKS[framework]} ({way})[/bold] {label}")
    start = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "epoch " in line:
                console.print("   ", line[line.index("epoch ") :].strip(), highlight=False)
            if time.monotonic() - start > TIME_LIMIT:
                process.terminate()
    if process.returncode != 0 or not path.exists():
        console.print("".join(lines[-40:]), markup=False, highlight=False)
        sys.exit(f"{' '.join(command)} failed with code {process.returncode}")
    with np.load(path) as data:
        parts = {name.split("/")[2]: data[name] for name in sorted(data.files) if name.startswith("part/")}
        return Run(data["losses"], data["accuracies"], data["weights"], parts)


def curves(framework: str, runs: dict[str, Run]) -> None:
    """The table of losses and accuracies, and how far (b) and (c) end from (a)."""
    table = Table(title=f"{FRAMEWORKS[framework]}: training loss / test accuracy after each epoch", title_justify="left")
    table.add_column("")
    for way in runs:
        table.add_column(f"({way}) {WAYS[way][0]}", justify="right")
    for epoch in range(EPOCHS):
        cells = [f"{run.losses[epoch]:.4f} / {run.accuracies[epoch]:.3f}" for run in runs.values()]
        table.add_row(f"epoch {epoch + 1}", *cells)
    for what in ("losses", "weights"):
        distances = [np.abs(getattr(run, what) - getattr(runs["a"], what)).max() for run in runs.values()]
        table.add_row(f"{what} from (a)", "", *(f"{distance:.2g}" for distance in distances[1:]))
    console.print(table)


def first_step(runs: dict[str, Run]) -> None:
    """Where in the first step (a) and (c) part, from the recorded parts of the PyTorch runs."""
    table = Table(title="First step, PyTorch, identical weights: (c) against (a), in the order of computation")
    table.title_justify = "left"
    for column in ("part of the step", "largest difference", "equal bits", "(b), for comparison"):
        table.add_column(column, justify="left" if column.startswith("part") else "right")
    first = None
    for name, expected in runs["a"].parts.items():
        got, local = runs["c"].parts[name], runs["b"].parts[name]
        equal = got.tobytes() == expected.tobytes()
        if not equal and first is None:
            first = name
        table.add_row(
            name, f"{np.abs(got - expected).max():.2g}", "yes" if equal else "no", f"{np.abs(local - expected).max():.2g}"
        )
    console.print(table)
    if first is None:
        console.print("Every part of the step is equal in every bit.")
    else:
        console.print(
            f"The first part that is not equal is [bold]{first}[/bold]. The layers before it gave equal bits for equal input, "
            "so the cause is the framework's own arithmetic there (a matrix product or convolution of 2 rows adds in another "
            "order than one of 4), and after it Horovod's averaging of float gradients. Rounding differences of 1e-7 then grow "
            "over the steps, as in any training; that is the whole distance between (a) and (c)."
        )


def plot(everything: dict[str, dict[str, Run]], path: Path) -> None:
    """Loss and accuracy per epoch of every run."""
    figure, axes = plt.subplots(2, len(everything), figsize=(5 * len(everything), 7), squeeze=False, layout="constrained")
    epochs = np.arange(1, EPOCHS + 1)
    styles = {"a": ("black", "-", 5), "b": ("tab:red", "--", 2), "c": ("tab:cyan", "-", 2)}
    for column, (framework, runs) in enumerate(everything.items()):
        for way, run in runs.items():
            color, line, width = styles[way]
            label = f"({way}) {WAYS[way][0]}"
            axes[0, column].plot(epochs, run.losses, line, color=color, linewidth=width, label=label)
            axes[1, column].plot(epochs, run.accuracies, line, color=color, linewidth=width, label=label)
        axes[0, column].set(title=FRAMEWORKS[framework], ylabel="training loss", xticks=epochs)
        axes[1, column].set(xlabel="epoch", ylabel="test accuracy", xticks=epochs)
        axes[0, column].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Runs everything."""
    OUT.mkdir(exist_ok=True)
    everything = {framework: {way: train(framework, way) for way in WAYS} for framework in FRAMEWORKS}
    for framework, runs in everything.items():
        curves(framework, runs)
    first_step(everything["torch"])
    picture = OUT / "demo.png"
    plot(everything, picture)
    console.print(f"Plot: {picture}")
    sys.exit(subprocess.run([sys.executable, "-m", "hvd_syncbn.cli", "verify"]).returncode)


if __name__ == "__main__":
    main()
