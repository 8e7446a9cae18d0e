"""The kernels beside those of torch.nn.SyncBatchNorm, F.batch_norm (cuDNN where PyTorch picks it) and a copy of the same bytes.

`python -m benchmarks.gpu.speed FOLDER` writes speed.json after every row, and speed.txt. All at size 1, without a collective.
The least traffic of a batch norm is counted: forward 3 passes over the tensor (read, read and write), backward 5. Every
contender runs behind a pause of the GPU that lets the host enqueue all of it first; a sample whose start event was over
before that is dropped, as it holds the host's time. The order rotates from round to round; the figure is the median.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hvd_syncbn.torch_impl import ops

SHAPES = [(64, 112, 112), (256, 56, 56), (512, 28, 28), (2048, 7, 7)]
BATCHES = (32, 256)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = {"forward": 3, "backward": 5}
PEERS = ("torch SyncBatchNorm", "F.batch_norm")
EPS = 1e-5
ROUNDS = 15
WARM_UP = 2
PAUSE_CYCLES = 400_000  # 0.2 ms
MOST_CYCLES = 8 * PAUSE_CYCLES

GOALS = {"of copy": 0.8, "of the best peer": 1.0}
"""The least speed beside a copy and the faster peer, for tensors that the second-level cache cannot hold."""

_LARGE_BYTES = 100e6

Contender = Callable[[], Any]
Row = dict[str, Any]


def contenders(x: torch.Tensor, dy: torch.Tensor) -> dict[str, dict[str, Contender]]:
    """By direction and name: what is timed. What a step computes before its kernels is computed here."""
    channels, count = x.shape[1], x.numel() // x.shape[1]
    weight, bias = torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda")
    mean, var = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")

    def our_apply(packet: torch.Tensor) -> Any:
        return ops.forward_apply(x, packet, weight, bias, None, mean, var, None, 0.9, 0.1, True, True, EPS, False, "speed")

    def our_backward_apply(packet: torch.Tensor) -> Any:
        return ops.backward_apply(x, dy, None, packet, stats, weight, False, "speed")

    packet = ops.forward_moments(x, EPS)
    _, stats = our_apply(packet)
    back = ops.backward_moments(x, dy, None, stats, torch.float32)[0]

    counts = torch.tensor([count], device="cuda", dtype=torch.float32)
    int_counts = counts.int()

    def peer_forward() -> Any:
        m, i = torch.batch_norm_stats(x, EPS)
        m, i = torch.batch_norm_gather_stats_with_counts(x, m[None], i[None], mean, var, 0.1, EPS, counts)
        return torch.batch_norm_elemt(x, weight, bias, m, i, EPS)

    peer_mean, peer_invstd = torch.batch_norm_stats(x, EPS)

    def peer_backward() -> Any:
        sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(dy, x, peer_mean, peer_invstd, weight, True, True, True)
        return torch.batch_norm_backward_elemt(dy, x, peer_mean, peer_invstd, weight, sum_dy, sum_dy_xmu, int_counts)

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


def sample(run: Contender, pause: int) -> tuple[float, bool]:
    """Milliseconds of one run, and whether the host had enqueued it before the GPU began it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(pause)
    start.record()
    run()
    end.record()
    in_time = not start.query()
    end.synchronize()
    return start.elapsed_time(end), in_time


def measure(runs: dict[str, Contender]) -> tuple[dict[str, float | None], dict[str, int]]:
    """Median milliseconds of each, None where every sample was dropped; and how many samples were dropped."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    dropped = dict.fromkeys(runs, 0)
    pauses = dict.fromkeys(runs, PAUSE_CYCLES)
    names = list(runs)
    for round_ in range(ROUNDS + WARM_UP):
        for i in range(len(names)):
            name = names[(round_ + i) % len(names)]
            ms, in_time = sample(runs[name], pauses[name])
            if round_ < WARM_UP:
                continue
            if in_time:
                times[name].append(ms)
            else:
                dropped[name] += 1
                pauses[name] = min(2 * pauses[name], MOST_CYCLES)
    return {name: statistics.median(values) if values else None for name, values in times.items()}, dropped


def rows() -> Iterator[Row]:
    """One row per case and direction, the most telling cases first."""
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
                        about = {"shape": [batch, *shape], "layout": layout, "dtype": dtype_name, "direction": direction}
                        yield about | ratios(*measure(runs), size, PASSES[direction])


def ratios(ms: dict[str, float | None], dropped: dict[str, int], size: int, passes: int) -> Row:
    """The figures of a row from its times."""
    row: Row = {"megabytes": size / 1e6, "ms": ms, "dropped": dropped}
    ours, copy = ms["ours"], ms["copy"]
    if ours:
        row["ours GB/s"] = passes * size / ours / 1e6
        row["of copy"] = None if copy is None else copy / ours
        peers = [time for name in PEERS if (time := ms[name]) is not None]
        row["of the best peer"] = min(peers) / ours if peers else None
    return row


def goals(measured: list[Row]) -> dict[str, list[str]]:
    """By goal, the rows of large tensors that miss it."""
    missed: dict[str, list[str]] = {}
    for name, bound in GOALS.items():
        missed[name] = [
            f"{'x'.join(map(str, row['shape']))} {row['layout']} {row['dtype']} {row['direction']}: {row[name]:.2f}"
            for row in measured
            if row["megabytes"] * 1e6 >= _LARGE_BYTES and row.get(name) is not None and row[name] < bound
        ]
    return missed


def summary(measured: list[Row]) -> str:
    """One sentence about the goals."""
    large = sum(row["megabytes"] * 1e6 >= _LARGE_BYTES for row in measured)
    said = [f"at least {GOALS[name]:.2f} {name}: {large - len(rows)} of {large}" for name, rows in goals(measured).items()]
    return f"{len(measured)} rows; large tensors that meet {', '.join(said)}"


def table(measured: list[Row]) -> str:
    """The rows for a person: microseconds, and speed ratios."""
    names = list(measured[0]["ms"])
    head = [f"{'shape':<18} {'layout':<13} {'dtype':<8} {'direction':<9}", *(f"{name:>19}" for name in names)]
    lines = [" ".join([*head, f"{'GB/s':>6} {'of copy':>8} {'of peer':>8} {'dropped':>7}"])]
    for row in measured:
        shape = "x".join(map(str, row["shape"]))
        cells = [f"{shape:<18} {row['layout']:<13} {row['dtype']:<8} {row['direction']:<9}"]
        cells += [f"{_number(ms, 1000, 1):>19}" for ms in row["ms"].values()]
        found = (
            _number(row.get(name), 1, places) for name, places in (("ours GB/s", 0), ("of copy", 2), ("of the best peer", 2))
        )
        cells.append("{:>6} {:>8} {:>8}".format(*found) + f" {sum(row['dropped'].values()):>7}")
        lines.append(" ".join(cells))
    for name, missed in goals(measured).items():
        lines.append(f"goal, at least {GOALS[name]:.2f} {name}: " + ("missed by" if missed else "met"))
        lines += [f"  {row}" for row in missed]
    return "\n".join(lines)


def _number(value: float | None, factor: float, places: int) -> str:
    return "-" if value is None else f"{factor * value:.{places}f}"


def main() -> None:
    """Measure everything, and write the figures after every row."""
    folder = Path(sys.argv[1])
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    measured: list[Row] = []
    for row in rows():
        measured.append(row)
        content = {"about": about, "summary": summary(measured), "rows": measured}
        (folder / ".speed.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / ".speed.json").replace(folder / "speed.json")
        (folder / "speed.txt").write_text(table(measured) + "\n")
        print(table([row]).splitlines()[1], flush=True)
    print(table(measured))


if __name__ == "__main__":
    main()
