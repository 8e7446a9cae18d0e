"""Runs many steps of layers in one job and checks for errors and growing memory: `make soak`.

Every step draws the batch size, the spatial size, the layout, the split of the samples between ranks (some get none), one of
three layers that exist for the whole job, and the ranks that share the batch: all, those of a process set of two, or each rank
alone in a process set. With two ranks the set has both; with `--ranks 3` the first rank is not a member and trains alone while
the others share. In TensorFlow every second call runs in a graph, traced once for all shapes.
Results are compared byte by byte with the same layer on the whole batch on one rank; the sha256 of those bytes must be equal on
all ranks and in both frameworks. Memory, threads and file handles are recorded after every chunk of steps. Both frameworks run
at once if that needs at most four processes.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import jobs
from benchmarks.measure import EPS, FRAMEWORKS, Framework, Record
from benchmarks.settings import SHORT_CYCLE
from hvd_syncbn.groups import Groups

MOST_PROCESSES = 4
CHANNELS = (3, 16, 19)
MOST_SAMPLES = 9
MOST_POSITIONS = 7  # in either direction
MOMENTUM = 0.1
WHO = ("shared", "shared whole", "pair", "pair whole", "own", "twin")
"""Layers: of all ranks, and its reference on the whole batch; of a process set of two, and its reference; of this rank alone,
and the same in the other layout."""

Array = NDArray[np.float32]


class Step(NamedTuple):
    """The random choices of a step, equal on every rank and in every framework."""

    layer: int
    x: Array  # [n, c, h, w], the whole batch
    dy: Array
    last: bool  # channels last
    parts: dict[int, slice]  # the samples of each rank that shares the batch; every other rank has the whole batch
    among: str  # "shared", "pair", or "own" (each rank alone in a process set)


def draw(number: int, ranks: int) -> Step:
    """Return the step of this number."""
    rng = np.random.default_rng(number)
    layer = int(rng.integers(len(CHANNELS)))
    samples = int(rng.integers(1, MOST_SAMPLES + 1))
    height, width = rng.integers(2, MOST_POSITIONS + 1, 2)  # always more than one value per channel
    shape = samples, CHANNELS[layer], int(height), int(width)
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    # With probability 1/3 each, the first rank has no samples, all, or some.
    cuts = [int(rng.choice(np.array([0, samples, rng.integers(samples + 1)]))) for _ in range(ranks - 1)]
    among = str(rng.choice(["shared", "pair", "own"], p=[0.8, 0.1, 0.1]))
    sharing = pair(ranks) if among == "pair" else range(ranks)
    edges = [0, *sorted(cuts[: len(sharing) - 1]), samples]
    parts = dict(zip(sharing, map(slice, edges, edges[1:]), strict=True))
    return Step(layer, x * np.float32(4) + np.float32(100), dy, bool(rng.integers(2)), parts, among)


def pair(ranks: int) -> list[int]:
    """Return the last two ranks."""
    return list(range(ranks))[-2:]


def sets(hvd: Any, groups: Callable[[int], Groups]) -> dict[str, Any]:
    """Return the process sets of the layers; on two ranks the set of both is Horovod's global process set."""
    ranks = hvd.size()
    both = hvd.global_process_set if ranks == 2 else hvd.add_process_set(pair(ranks))
    return {who: groups(1).mine for who in WHO} | {"shared": None, "pair": both}


class TorchLayers:
    """Three layers of each kind."""

    def __init__(self) -> None:
        import horovod.torch as hvd

        from hvd_syncbn.torch import SyncBatchNorm, groups

        self.layers = {}
        for who, process_set in sets(hvd, groups).items():
            for i, channels in enumerate(CHANNELS):
                layer = SyncBatchNorm(channels, EPS, MOMENTUM, activation="relu", process_set=process_set)
                layer.collective_name = f"soak.{i}"
                self.layers[who, i] = layer

    def step(self, who: str, i: int, x: Array, dy: Array, last: bool) -> list[Array]:
        """Output, input gradient and running statistics."""
        import torch

        tensors = [torch.from_numpy(values) for values in (x, dy)]
        if last:
            tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
        tensors[0].requires_grad_()
        layer = self.layers[who, i]
        layer.zero_grad()
        y = layer(tensors[0])
        y.backward(tensors[1])
        gradient = tensors[0].grad
        assert gradient is not None and layer.running_mean is not None and layer.running_var is not None
        return [y.detach().numpy(), gradient.numpy(), layer.running_mean.numpy(), layer.running_var.numpy()]


class TensorFlowLayers:
    """The same layers as functions with state."""

    def __init__(self) -> None:
        import horovod.tensorflow as hvd

        from hvd_syncbn.tensorflow import groups

        self.sets = sets(hvd, groups)
        self.state = {
            (who, i): [np.zeros(channels, np.float32), np.ones(channels, np.float32)]
            for who in WHO
            for i, channels in enumerate(CHANNELS)
        }
        self.calls = 0
        self.functions: dict[tuple[str, int, bool], Any] = {}

    def step(self, who: str, i: int, x: Array, dy: Array, last: bool) -> list[Array]:
        """Output, input gradient and running statistics."""
        values = [np.moveaxis(t, 1, -1) if last else t for t in (x, dy)]
        if (who, i, last) not in self.functions:
            self.functions[who, i, last] = self._function(who, i, last)
        function = self.functions[who, i, last]
        self.calls += 1
        results = (function if self.calls % 2 else function.python_function)(*values, *self.state[who, i])
        y, gradient, *self.state[who, i] = (t.numpy() for t in results)
        return [*(np.moveaxis(t, -1, 1) if last else t for t in (y, gradient)), *self.state[who, i]]

    def _function(self, who: str, i: int, last: bool) -> Any:
        """Return a step of this layer as a graph for all shapes."""
        import tensorflow as tf

        from hvd_syncbn.tensorflow import sync_batch_norm

        channels = CHANNELS[i]
        parameters = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        images = tf.TensorSpec([None, None, None, channels] if last else [None, channels, None, None])
        vector = tf.TensorSpec([channels])

        def step(x: Any, dy: Any, mean: Any, variance: Any) -> list[Any]:
            x = tf.convert_to_tensor(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                y, *statistics = sync_batch_norm(
                    x,
                    *parameters,
                    mean,
                    variance,
                    training=True,
                    momentum=1 - MOMENTUM,
                    epsilon=EPS,
                    axis=-1 if last else 1,
                    activation="relu",
                    unbiased_variance=True,
                    process_set=self.sets[who],
                    name=f"soak.{i}",
                )
            return [y, tape.gradient(y, x, output_gradients=tf.convert_to_tensor(dy)), *statistics]

        return tf.function(step, input_signature=[images, images, vector, vector], autograph=False)


@cache
def _job(framework: str) -> tuple[Any, Any]:
    """Return the layers and the digest, which exist for the whole job."""
    return (TorchLayers() if framework == "torch" else TensorFlowLayers()), hashlib.sha256()


def measure(framework: Framework, name: str, first: int, steps: int, ranks: int) -> Record:
    """Run a chunk of steps and return the differences, the digest and the resources of this process."""
    layers, digest = _job(name)
    different = 0
    kinds = {"own": 0, "pair": 0, "empty": 0}
    for number in range(first, first + steps):
        layer, x, dy, last, parts, among = draw(number, ranks)
        mine = parts.get(framework.rank, slice(None))
        if among == "own" or framework.rank not in parts:
            # Compare with the other layout, because this rank's samples are the whole batch.
            got, want = (layers.step(who, layer, x[mine], dy[mine], how) for who, how in (("own", last), ("twin", not last)))
        else:
            got = layers.step(among, layer, x[mine], dy[mine], last)
        if among != "own":
            whole = layers.step(f"{among} whole", layer, x, dy, last)
            for values in whole:
                digest.update(np.ascontiguousarray(values).tobytes())
            if framework.rank in parts:
                want = [whole[0][mine], whole[1][mine], *whole[2:]]
        different += any(a.tobytes() != b.tobytes() for a, b in zip(got, want, strict=True))
        if among in kinds:
            kinds[among] += 1
        kinds["empty"] += any(part.start == part.stop for part in parts.values())
    process = psutil.Process()
    return {
        "first": first,
        "steps": steps,
        "different": different,
        **kinds,
        "sha256": digest.hexdigest(),
        "MiB": process.memory_info().rss / 2**20,
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "errors": {},
    }


def plot(outcomes: list[jobs.Outcome], path: Path) -> None:
    """Plot memory, threads and file handles of every rank against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for axis, what in zip(axes, ("MiB", "threads", "files"), strict=True):
        for outcome in outcomes:
            for rank in range(outcome.job.ranks):
                records = [ranks[rank] for ranks in outcome.records]
                steps = [record["first"] + record["steps"] for record in records]
                label = f"{FRAMEWORKS[outcome.job.framework]}, rank {rank}"
                axis.plot(steps, [record[what] for record in records], label=label)
        axis.set(title={"MiB": "resident memory, MiB", "files": "file handles"}.get(what, what), xlabel="steps")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def table(outcomes: list[jobs.Outcome]) -> Table:
    """Return a table of the results; memory is from after the first tenth, when all code has run once, to the end."""
    result = Table(title="Soak", title_justify="left")
    for column in ("framework", "rank", "steps", "empty", "pair", "alone", "differ", "MiB", "threads", "files", "sha256"):
        result.add_column(column, justify="left" if column in ("framework", "sha256") else "right")
    for outcome in outcomes:
        for rank in range(outcome.job.ranks):
            records = [ranks[rank] for ranks in outcome.records]
            settled = records[len(records) // 10 :]
            sums = [str(sum(record[key] for record in records)) for key in ("steps", "empty", "pair", "own", "different")]
            spans = [f"{settled[0][key]:.0f} -> {settled[-1][key]:.0f}" for key in ("MiB", "threads", "files")]
            name = FRAMEWORKS[outcome.job.framework]
            result.add_row(name, str(rank), *sums, *spans, records[-1]["sha256"][:12])
    return result


def main() -> int:
    """Run both frameworks; return exit status 0 if all steps ran, no byte differed, and all digests are equal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 3, 4))
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--chunk", type=int, default=200)
    parser.add_argument("--limit", type=float, default=3 * 3600, help="seconds for each framework")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    console = Console() if Console().is_terminal else Console(width=120)
    console.print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, load {os.getloadavg()[0]:.1f}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    starts = range(0, args.steps, args.chunk)
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(MOST_PROCESSES // args.ranks) as pool:

        def run(framework: str) -> jobs.Outcome:
            cases = [
                {
                    "kind": "soak",
                    "name": framework,
                    "first": first,
                    "steps": min(args.chunk, args.steps - first),
                    "ranks": args.ranks,
                }
                for first in starts
            ]
            label = FRAMEWORKS[framework]
            bar = progress.add_task(label, total=len(cases))
            # On a busy machine a rank may be delayed for longer than Gloo's default timeout of 30 s.
            environment = SHORT_CYCLE | {"HOROVOD_GLOO_TIMEOUT_SECONDS": "300", "HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
            job = jobs.Job(f"soak, {label}", framework, cases, args.ranks, environment=environment, limit=args.limit)
            return jobs.run(job, lambda done: progress.advance(bar, done))

        outcomes = list(pool.map(run, FRAMEWORKS))
    args.out.mkdir(exist_ok=True, parents=True)
    rows = [
        {"job": outcome.job.title, "seconds": outcome.seconds, "error": outcome.error, "records": outcome.records}
        for outcome in outcomes
    ]
    (args.out / "soak.json").write_text(json.dumps(rows, indent=1) + "\n")
    for outcome in outcomes:
        console.print(f"{outcome.job.title}: {outcome.seconds:.0f} s, {outcome.error or 'no error'}")
    if any(not outcome.records for outcome in outcomes):
        return 1
    console.print(table(outcomes))
    plot(outcomes, args.out / "soak.png")
    every = [record for outcome in outcomes for ranks in outcome.records for record in ranks]
    last = {record["sha256"] for outcome in outcomes for record in outcome.records[-1]}
    good = all(outcome.error is None for outcome in outcomes) and not any(r["different"] for r in every) and len(last) == 1
    console.print("EQUAL: every step, every byte" if good else "[red]NOT EQUAL, or not finished[/red]")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
