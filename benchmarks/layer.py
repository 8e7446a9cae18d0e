"""The layer on one rank (the same kernels, no collective) compared with the framework's own layer, forward and backward.

GB/s counts the minimum traffic of a batch norm: forward 3 passes over the tensor, backward 5. Memory is "fresh", as PyTorch
allocates it by default, or "warm" (`WARM_MEMORY`); TensorFlow's allocator reuses memory.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import measure as m
from benchmarks.jobs import Outcome
from benchmarks.measure import Framework, Record, Step
from hvd_syncbn import native, protocol
from hvd_syncbn.cli.doctor import WARM_MEMORY

# The first four are those of a ResNet-50's stages, with 32 images.
BIG = [(32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28)]
SHAPES = [*BIG, (32, 2048, 7, 7), (8, 16, 8, 8), (64, 256), (4096, 1024)]
LAYOUTS = ("channels first", "channels last")
PASSES = {"forward": 3, "backward": 5}
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
KEYS = ("shape", "layout", "dtype", "threads", "memory")


def cases(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Return every shape in its layouts (2-D input has one), without slow cases that add no information."""
    shapes = [SHAPES[2], SHAPES[3], SHAPES[6]] if quick else SHAPES
    return [
        {"kind": "layer", "shape": shape, "layout": layout, "dtype": dtype, "rounds": _rounds(shape)}
        for dtype in (("float32",) if quick or threads > 1 else ("float32", "bfloat16"))
        for shape in shapes
        if (dtype, threads) == ("float32", 1) or shape not in (BIG[:2] if dtype == "float32" else BIG)
        for layout in (LAYOUTS if len(shape) == 4 else LAYOUTS[1:])
    ]


def warm_cases(quick: bool) -> list[dict[str, Any]]:
    """Return the shapes that are large enough for glibc to map new pages."""
    return [case for case in cases(quick, 1) if case["dtype"] == "float32" and math.prod(case["shape"]) > 1 << 20]


def exact_sums_cases(quick: bool) -> list[dict[str, Any]]:
    """Return cases for the cost of exact sums, on the four image shapes."""
    return [{"kind": "exact sums", "shape": shape, "rounds": 7} for shape in SHAPES[2 if quick else 0 : 4]]


def _rounds(shape: tuple[int, ...]) -> int:
    return 7 if math.prod(shape) > 1 << 20 else 101


def measure(framework: Framework, shape: list[int], layout: str, dtype: str, rounds: int) -> Record:
    """Return the times of every contestant, and of a copy of the input with the same number of threads."""
    size = tuple(shape)
    make = {name: partial(framework.step, name, size, layout, dtype) for name in framework.local}
    make["copy"] = partial(_copy, math.prod(size) * ITEM_BYTES[dtype], framework.threads)
    steps, errors = m.attempt(make)
    return {"times": m.rounds(steps, errors, rounds), "errors": errors}


def _copy(size: int, threads: int) -> Step:
    """Return a step that copies bytes, one slice per thread."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    edges = [size * i // threads for i in range(threads + 1)]
    pool = ThreadPoolExecutor(threads)

    def part(i: int) -> None:
        np.copyto(target[edges[i] : edges[i + 1]], source[edges[i] : edges[i + 1]])

    return m.timed(lambda: list(pool.map(part, range(threads))) if threads > 1 else part(0))


def measure_exact_sums(framework: Framework, shape: list[int], rounds: int) -> Record:
    """Return times of the forward kernels, and of the moments over the same memory in large pieces and in half-sized pieces.

    A piece costs its additions plus a fixed part for exactness (the fold of its lanes, the exact sum). The times for large and
    half-sized pieces are extrapolated to no pieces at all; the fixed part is the time above that (see `exact_sums_share`).
    """
    samples, channels, *spatial = shape
    values = math.prod(shape)
    x = np.random.default_rng(0).standard_normal(values, np.float32)
    own = native.shape(samples, channels, math.prod(spatial), "float32")
    views = {
        "moments": own,
        "large pieces": native.shape(values // protocol.PIECE // 16, 16, protocol.PIECE, "float32"),
        "half pieces": native.shape(values // protocol.PIECE // 8, 16, protocol.PIECE // 2, "float32"),
    }
    packet = native.forward_packet(own, x, m.EPS)
    steps = {name: m.timed(partial(native.forward_packet, view, x, m.EPS)) for name, view in views.items()}
    steps["apply"] = m.timed(lambda: native.forward(own, x, packet, m.EPS))
    errors: dict[str, str] = {}
    m.rounds(steps, errors, 1)
    return {"times": m.rounds(steps, errors, rounds), "errors": errors}


def exact_sums_share(times: m.Times) -> m.Spread:
    """Return the share of exact sums in the forward kernels' time, from the times of `measure_exact_sums`."""
    own, large, half, apply = (m.total(times, name) for name in ("moments", "large pieces", "half pieces", "apply"))
    above = [o - (2 * piece - h) for o, piece, h in zip(own, large, half, strict=True)]
    return m.ratios(above, [o + a for o, a in zip(own, apply, strict=True)])


def rows(outcomes: list[Outcome]) -> list[Record]:
    """Return a row per shape, layout, dtype, threads, framework and direction."""
    found = []
    for outcome in outcomes:
        job = outcome.job
        for case, times, errors, _ in outcome.of("layer"):
            size = math.prod(case["shape"]) * ITEM_BYTES[case["dtype"]] / 1e9
            memory = "warm" if WARM_MEMORY.keys() <= job.environment.keys() else "fresh"
            row = {"framework": job.framework, "threads": job.threads, "memory": memory}
            row |= {name: case[name] for name in ("shape", "layout", "dtype")}
            if not {"ours", "local", "copy"} <= times.keys():
                found.append(row | {"direction": "forward", "errors": errors})
                continue
            for i, (direction, passes) in enumerate(PASSES.items()):
                seconds = {name: [parts[i] for parts in times[name]] for name in ("ours", "local")}
                # A copy reads and writes its bytes.
                copies = [passes / 2 * parts[0] for parts in times["copy"]]
                found.append(
                    row
                    | {
                        "direction": direction,
                        "GB/s": {name: m.spread([passes * size / s for s in seconds[name]]) for name in seconds},
                        "copy GB/s": m.spread([passes * size / s for s in copies]),
                        "ratio": m.ratios(seconds["local"], seconds["ours"]),
                        "of copy": m.ratios(copies, seconds["ours"]),
                    }
                )
    return found


def exact_sums_rows(outcomes: list[Outcome]) -> list[Record]:
    """Return a row per shape."""
    return [
        {"shape": case["shape"], "share": exact_sums_share(times)}
        for outcome in outcomes
        for case, times, _, _ in outcome.of("exact sums")
    ]


def table(rows: list[Record], framework: str) -> Table:
    """Return a table of a framework's rows, with both directions in a row."""
    peer = m.label(framework, "local")
    title = f"{m.FRAMEWORKS[framework]}, 1 rank, GB/s by minimum traffic: ours / {peer}"
    result = Table(title=title, title_justify="left")
    for column in KEYS:
        result.add_column(column)
    for direction in PASSES:
        for column in (f"{direction}: ours", "peer", "ratio (quartiles)", "of copy"):
            result.add_column(column, justify="right")
    mine = [row for row in rows if row["framework"] == framework]
    for row in mine:
        if row["direction"] != "forward":
            continue
        cells = [m.sizes(row["shape"]), *(str(row[name]) for name in KEYS[1:])]
        if "errors" in row:
            result.add_row(*cells, str(row["errors"]))
            continue
        same = [r for r in mine if all(r[name] == row[name] for name in KEYS)]
        for part in same:
            speeds = part["GB/s"]
            cells += [m.number(speeds[name].middle) for name in ("ours", "local")]
            cells += [f"{part['ratio']}x", f"{part['of copy'].middle:.0%}"]
        result.add_row(*cells)
    return result
