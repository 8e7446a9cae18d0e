"""The layer at size 1 (the same kernels, no collective) beside `torch.nn.functional.batch_norm`, forward and backward.

GB/s counts the least traffic that a batch norm needs: forward 3 passes over the tensor, backward 5. Ours, the peer and a copy
are timed in turn, so a machine that changes its speed changes it for all; the figure is the median, the spread the
quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hvd_syncbn.torch import sync_batch_norm

# facts.md's four, and a 2-D one.
SHAPES = [(32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 2048, 7, 7), (4096, 1024)]
FORWARD_PASSES, BACKWARD_PASSES = 3, 5

Row = dict[str, Any]


def _inputs(shape: tuple[int, ...], layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    if layout == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    return x.requires_grad_(), dy


def _steps(x: torch.Tensor, dy: torch.Tensor) -> dict[str, Callable[[], tuple[float, float]]]:
    """Ours and the peer: seconds of one forward and one backward."""
    channels = x.shape[1]
    weight, bias = torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)
    mean, var = torch.zeros(channels), torch.ones(channels)

    def step(function: Callable[..., torch.Tensor]) -> tuple[float, float]:
        x.grad = weight.grad = bias.grad = None
        start = time.perf_counter()
        y = function(x, mean, var, weight, bias, training=True)
        middle = time.perf_counter()
        y.backward(dy)
        return middle - start, time.perf_counter() - middle

    return {"ours": lambda: step(sync_batch_norm), "F.batch_norm": lambda: step(F.batch_norm)}


def _copy(x: torch.Tensor) -> float:
    target = torch.empty_like(x)
    target.copy_(x.detach())
    start = time.perf_counter()
    target.copy_(x.detach())
    return time.perf_counter() - start


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def measure(quick: bool, console: Console) -> list[Row]:
    """One row per shape, layout, thread count and direction."""
    hvd.init()
    shapes = SHAPES[1:2] + SHAPES[3:] if quick else SHAPES
    repetitions = 7 if quick else 15
    cases = [
        (shape, layout, threads)
        for shape in shapes
        for layout in (("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",))
        for threads in ((1,) if quick else (1, 2))
    ]
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("layer", total=len(cases))
        for shape, layout, threads in cases:
            torch.set_num_threads(threads)
            x, dy = _inputs(shape, layout)
            steps = _steps(x, dy)
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
            copies = []
            for repetition in range(repetitions + 1):  # the first warms up
                copies.append(_copy(x))
                for name, step in steps.items():
                    seconds = step()
                    if repetition:
                        times[name].append(seconds)
            size = x.numel() * x.element_size() / 1e9
            copy = 2 * size / statistics.median(copies)
            for i, (direction, passes) in enumerate((("forward", FORWARD_PASSES), ("backward", BACKWARD_PASSES))):
                row: Row = {"shape": list(shape), "layout": layout, "threads": threads, "direction": direction, "copy": copy}
                for name, samples in times.items():
                    low, middle, high = _quartiles([seconds[i] for seconds in samples])
                    row[name] = passes * size / middle
                    row[f"{name} quartiles"] = [passes * size / high, passes * size / low]
                ratios = [b[i] / a[i] for a, b in zip(times["ours"], times["F.batch_norm"], strict=True)]
                row["ratio"] = statistics.median(ratios)
                rows.append(row)
            progress.advance(task)
    return rows


def table(rows: list[Row]) -> Table:
    """The rows for a person."""
    result = Table(title="Layer at size 1, float32, GB/s (quartiles)", title_justify="left")
    for column in ("shape", "layout", "threads", "direction", "ours", "F.batch_norm", "copy", "ours / F.batch_norm"):
        result.add_column(column, justify="left" if column in ("shape", "layout", "direction") else "right")
    for row in rows:
        speeds = [f"{row[name]:.1f} ({row[f'{name} quartiles'][0]:.1f}-{row[f'{name} quartiles'][1]:.1f})" for name in
                  ("ours", "F.batch_norm")]  # fmt: skip
        result.add_row(
            "x".join(map(str, row["shape"])), row["layout"], str(row["threads"]), row["direction"], *speeds,
            f"{row['copy']:.1f}", f"{row['ratio']:.2f}x",
        )  # fmt: skip
    return result
