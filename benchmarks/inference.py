"""The speed of folded and frozen layers in one process: `python -m benchmarks.inference torch` (or `keras`), about a minute.

Compares a ResNet-50's inference before and after `fold_batchnorm`, and a frozen layer with a shortcut and relu in training, as
one operator and as the framework's own operations. Both are called in turn; ratios are medians (quartiles) of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import measure as m
from benchmarks.layer import BIG
from benchmarks.measure import EPS, Step

IMAGES, SIZE, ROUNDS = 4, 160, 9


class Torch:
    """PyTorch."""

    folding = 0.0  # seconds
    difference = 0.0

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def networks(self) -> dict[str, Step]:
        import torch
        from torch import nn

        from benchmarks.with_torch import resnet50
        from hvd_syncbn.torch import fold_batchnorm

        model = resnet50(nn.BatchNorm2d).eval()
        start = time.perf_counter()
        folded = fold_batchnorm(model)
        self.folding = time.perf_counter() - start
        x = torch.randn(IMAGES, 3, SIZE, SIZE)

        def run(network: Any) -> None:
            with torch.no_grad():
                network(x)

        self.difference = float((folded(x) - model(x)).abs().max() / model(x).abs().max())
        return {"before": m.timed(partial(run, model)), "after": m.timed(partial(run, folded))}

    def frozen(self, shape: tuple[int, ...], layout: str, learns: bool) -> dict[str, Step]:
        import torch
        from torch.nn import functional as F

        from hvd_syncbn.torch import SyncBatchNorm, freeze_batchnorm

        layer = freeze_batchnorm(SyncBatchNorm(shape[1], EPS, activation="relu").train(), affine=learns)
        x, dy, residual = (torch.randn(shape) for _ in range(3))
        if layout == "channels last":
            x, dy, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, residual))
        x.requires_grad_(), residual.requires_grad_()

        def unfused(x: Any, residual: Any) -> Any:
            y = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, EPS)
            return F.relu(y + residual)

        def step(function: Callable[..., Any]) -> tuple[float, float]:
            x.grad = residual.grad = None
            layer.zero_grad()
            start = time.perf_counter()
            y = function(x, residual)
            middle = time.perf_counter()
            y.backward(dy)
            return middle - start, time.perf_counter() - middle

        return {"one operator": partial(step, layer), "unfused": partial(step, unfused)}


class Keras:
    """Keras on TensorFlow, in graphs."""

    folding = 0.0
    difference = 0.0

    def __init__(self, threads: int) -> None:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)

    def networks(self) -> dict[str, Step]:
        import tensorflow as tf

        from benchmarks.with_tensorflow import TensorFlow
        from hvd_syncbn.keras import fold_batchnorm

        framework = TensorFlow.__new__(TensorFlow)
        framework._layers = 0
        model = framework._resnet50("local", SIZE)
        start = time.perf_counter()
        folded = fold_batchnorm(model)
        self.folding = time.perf_counter() - start
        x = tf.random.normal((IMAGES, SIZE, SIZE, 3))
        runs = {
            name: tf.function(partial(lambda network, x: network(x, training=False), network), autograph=False)
            for name, network in (("before", model), ("after", folded))
        }
        a, b = (np.asarray(run(x)) for run in runs.values())
        self.difference = float(np.abs(a - b).max() / np.abs(a).max())
        return {name: m.timed(partial(run, x)) for name, run in runs.items()}

    def frozen(self, shape: tuple[int, ...], layout: str, learns: bool) -> dict[str, Step]:
        import tensorflow as tf

        from hvd_syncbn.keras import SyncBatchNormalization, freeze_batchnorm

        last = layout == "channels last"
        sizes = (shape[0], *shape[2:], shape[1]) if last else shape
        layer = SyncBatchNormalization(axis=-1 if last else 1, epsilon=EPS, activation="relu")
        layer.build(sizes)
        freeze_batchnorm(layer, affine=learns)
        x, dy, residual = (tf.random.normal(sizes) for _ in range(3))

        def both(training: bool) -> Any:
            with tf.GradientTape() as tape:
                tape.watch([x, residual])
                y = layer(x, training=training, residual=residual)
            return y, tape.gradient(y, [x, residual, *(v.value for v in layer.trainable_variables)], dy)

        runs = {"one operator": True, "unfused": False}
        return {name: m.timed(tf.function(partial(both, training), autograph=False)) for name, training in runs.items()}


def main() -> None:
    """Print the results as two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=("torch", "keras"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    framework: Torch | Keras = Torch(args.threads) if args.framework == "torch" else Keras(args.threads)
    console = Console()
    errors: dict[str, str] = {}

    steps = framework.networks()
    m.rounds(steps, errors, 2)
    times = m.rounds(steps, errors, ROUNDS)
    before, after = (m.total(times, name) for name in ("before", "after"))
    console.print(
        f"ResNet-50, {IMAGES} images of {SIZE}: {m.number(1e3 * m.spread(before).middle)} ms, folded "
        f"{m.number(1e3 * m.spread(after).middle)} ms, speedup {m.ratios(before, after)}. Folding took "
        f"{framework.folding:.2f} s; outputs differ by {framework.difference:.1g} of the largest."
    )
    table = Table(
        title="A frozen layer with a shortcut and relu, forward and backward: unfused / one operator", title_justify="left"
    )
    for column in ("shape", "layout", "gamma and beta", "unfused, ms", "one operator, ms", "ratio"):
        table.add_column(column)
    for shape in (BIG[1], BIG[2], (32, 2048, 7, 7), (8, 16, 8, 8)):
        for layout in ("channels first", "channels last"):
            for learns in (False, True):
                steps = framework.frozen(shape, layout, learns)
                m.rounds(steps, errors, 2)
                times = m.rounds(steps, errors, ROUNDS)
                unfused, one = (m.total(times, name) for name in ("unfused", "one operator"))
                cells = [m.number(1e3 * m.spread(values).middle) for values in (unfused, one)]
                table.add_row(m.sizes(shape), layout, "learn" if learns else "frozen", *cells, str(m.ratios(unfused, one)))
    console.print(table)
    for name, error in errors.items():
        console.print(f"[red]{name}: {error}[/red]")


if __name__ == "__main__":
    main()
