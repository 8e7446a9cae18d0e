"""Ours beside the kernels of torch.nn.SyncBatchNorm, F.batch_norm (cuDNN where PyTorch picks it) and a copy of the same bytes.

All at size 1, without a collective. The least traffic of a batch norm is counted: forward 3 passes over the tensor (read, read
and write), backward 5. Contenders take turns within a round, behind a pause of the GPU that lets the host run ahead, so that
launch overhead does not count; the figure is the median of the rounds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from hvd_syncbn.torch_impl import ops

SHAPES = [(64, 112, 112), (256, 56, 56), (512, 28, 28), (2048, 7, 7)]
BATCHES = (32, 256)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = {"forward": 3, "backward": 5}
EPS = 1e-5
ROUNDS = 20
PAUSE_CYCLES = 500_000

Contender = Callable[[], Any]


def contenders(x: torch.Tensor, dy: torch.Tensor) -> dict[str, dict[str, Contender]]:
    """By direction and name: what is timed."""
    channels, count = x.shape[1], x.numel() // x.shape[1]
    weight, bias = torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda")
    mean, var = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")

    def our_apply(packet: torch.Tensor) -> Any:
        return ops.forward_apply(x, packet, weight, bias, None, mean, var, None, 0.9, 0.1, True, EPS, False, "speed")

    def our_backward_apply(packet: torch.Tensor) -> Any:
        return ops.backward_apply(x, dy, None, packet, stats, weight, False, "speed")

    packet = ops.forward_moments(x, EPS)
    _, stats = our_apply(packet)
    back = ops.backward_moments(x, dy, None, stats, torch.float32)[0]

    counts = torch.tensor([count], device="cuda", dtype=torch.float32)

    def peer_forward() -> Any:
        m, i = torch.batch_norm_stats(x, EPS)
        m, i = torch.batch_norm_gather_stats_with_counts(x, m[None], i[None], mean, var, 0.1, EPS, counts)
        return torch.batch_norm_elemt(x, weight, bias, m, i, EPS)

    peer_mean, peer_invstd = torch.batch_norm_stats(x, EPS)

    def peer_backward() -> Any:
        sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(dy, x, peer_mean, peer_invstd, weight, True, True, True)
        return torch.batch_norm_backward_elemt(dy, x, peer_mean, peer_invstd, weight, sum_dy, sum_dy_xmu, counts.int())

    leaf, w, b = x.detach().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()
    local = F.batch_norm(leaf, mean, var, w, b, True, 0.1, EPS)
    size = x.numel() * x.element_size()
    source = torch.empty(max(PASSES.values()) * size // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy(passes: int) -> Contender:
        half = passes * size // 2  # read and written
        return lambda: target[:half].copy_(source[:half])

    return {
        "forward": {
            "ours": lambda: our_apply(ops.forward_moments(x, EPS)),
            "ours: moments": lambda: ops.forward_moments(x, EPS),
            "ours: apply": lambda: our_apply(packet),
            "torch SyncBatchNorm": peer_forward,
            "F.batch_norm": lambda: F.batch_norm(x, mean, var, weight, bias, True, 0.1, EPS),
            "copy": copy(PASSES["forward"]),
        },
        "backward": {
            "ours": lambda: our_backward_apply(ops.backward_moments(x, dy, None, stats, torch.float32)[0]),
            "ours: moments": lambda: ops.backward_moments(x, dy, None, stats, torch.float32),
            "ours: apply": lambda: our_backward_apply(back),
            "torch SyncBatchNorm": peer_backward,
            "F.batch_norm": lambda: torch.autograd.grad(local, (leaf, w, b), dy, retain_graph=True),
            "copy": copy(PASSES["backward"]),
        },
    }


def measure(runs: dict[str, Contender]) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS + 2):
        events = {}
        torch.cuda._sleep(PAUSE_CYCLES)
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        if round_ >= 2:  # the first ones warm up
            for name, (start, end) in events.items():
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def rows() -> list[dict[str, Any]]:
    """One row per case and direction."""
    result = []
    for batch in BATCHES:
        for shape in SHAPES:
            for layout, memory_format in LAYOUTS.items():
                for dtype_name, dtype in DTYPES.items():
                    x, dy = (
                        torch.randn(batch, *shape, device="cuda").to(dtype).contiguous(memory_format=memory_format)
                        for _ in range(2)
                    )
                    size = x.numel() * x.element_size()
                    for direction, runs in contenders(x, dy).items():
                        ms = measure(runs)
                        peers = [ms[name] for name in ("torch SyncBatchNorm", "F.batch_norm")]
                        result.append(
                            {
                                "shape": [batch, *shape],
                                "layout": layout,
                                "dtype": dtype_name,
                                "direction": direction,
                                "megabytes": size / 1e6,
                                "ms": ms,
                                "ours GB/s": PASSES[direction] * size / ms["ours"] / 1e6,
                                "of copy": ms["copy"] / ms["ours"],
                                "of the best peer": min(peers) / ms["ours"],
                            }
                        )
    return result


def table(measured: list[dict[str, Any]]) -> Table:
    """The rows for a person."""
    names = list(measured[0]["ms"])
    result = Table(title="Microseconds, median; ours / copy and ours / best peer as speed ratios", title_justify="left")
    for column in ("shape", "layout", "dtype", "direction", *names, "GB/s", "of copy", "of best peer"):
        result.add_column(column, justify="left" if column in ("shape", "layout", "dtype", "direction") else "right")
    for row in measured:
        result.add_row(
            "x".join(map(str, row["shape"])),
            row["layout"],
            row["dtype"],
            row["direction"],
            *(f"{1000 * row['ms'][name]:.1f}" for name in names),
            f"{row['ours GB/s']:.0f}",
            f"{row['of copy']:.2f}",
            f"{row['of the best peer']:.2f}",
        )
    return result


def main(out: str) -> None:
    """Measures everything, prints the table and writes it with the figures to a folder."""
    measured = rows()
    console = Console(record=True, width=230)
    console.print(table(measured))
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    folder = Path(out)
    (folder / "speed.txt").write_text(console.export_text())
    (folder / "speed.json").write_text(json.dumps({"about": about, "rows": measured}, indent=1) + "\n")
    print(f"Figures: {folder / 'speed.json'}")
