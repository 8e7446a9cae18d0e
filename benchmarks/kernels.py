"""The CPU kernels alone, in mapped memory, on every instruction-set path of this machine, compared with its memory bandwidth.

A whole call also includes page faults of the output, autograd and the framework's checks; `layer` measures those. GB/s counts
the bytes that a kernel moves: moments read the input (backward also the gradient); apply reads the same and writes the output
(backward: the gradients of the input and, here, of the residual).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import layer
from benchmarks import measure as m
from benchmarks.jobs import Outcome
from benchmarks.measure import Framework, Record
from hvd_syncbn import native

KERNELS = {"forward moments": 1, "forward apply": 2, "backward moments": 2, "backward apply": 4}
"""The kernels, each with the number of tensors that it reads or writes."""


def cases(quick: bool) -> list[dict[str, Any]]:
    """Return cases for the shapes of `layer`, without those dominated by the cost of a call."""
    shapes = [layer.SHAPES[2], layer.SHAPES[3], layer.SHAPES[6]] if quick else [*layer.SHAPES[:4], layer.SHAPES[6]]
    return [
        {"kind": "kernels", "shape": shape, "layout": layout, "rounds": 7}
        for shape in shapes
        for layout in (layer.LAYOUTS if len(shape) == 4 else layer.LAYOUTS[1:])
    ]


def measure(_framework: Framework, shape: list[int], layout: str, rounds: int) -> Record:
    """Return the times of every kernel on every path, and of reading and copying the input, in turn on one thread."""
    samples, channels, *spatial = shape
    own = native.shape(samples, channels, math.prod(spatial), "float32", layout.replace(" ", "_"))
    generator = np.random.default_rng(0)
    x, dy = (native.empty(own) for _ in range(2))
    for tensor in (x, dy):
        generator.standard_normal(dtype=np.float32, out=tensor)
    target = native.empty(own)
    packet = native.forward_packet(own, x, m.EPS)
    stats = native.forward(own, x, packet, m.EPS)[1]
    back = native.backward_packet(own, x, dy, stats)
    kernels: dict[str, Callable[[], object]] = {
        "forward moments": partial(native.forward_packet, own, x, m.EPS),
        "forward apply": partial(native.forward, own, x, packet, m.EPS),
        "backward moments": partial(native.backward_packet, own, x, dy, stats),
        "backward apply": partial(native.backward, own, x, dy, back, stats),
    }
    steps = {
        "read": m.timed(partial(np.bitwise_or.reduce, x.reshape(-1).view(np.uint64))),
        "copy": m.timed(partial(np.copyto, target, x)),
    }

    def on(path: str, kernel: Callable[[], object]) -> m.Step:
        step = m.timed(kernel)

        def run() -> tuple[float, ...]:
            native.set_isa(path)
            return step()

        return run

    for path in native.isas():
        steps |= {f"{name}, {path}": on(path, kernel) for name, kernel in kernels.items()}
    errors: dict[str, str] = {}
    m.rounds(steps, errors, 1)
    times = m.rounds(steps, errors, rounds)
    native.set_isa(native.isas()[-1])
    return {"times": times, "errors": errors, "paths": native.isas()}


def rows(outcomes: list[Outcome]) -> list[Record]:
    """Return a row per shape, layout, kernel and path: GB/s, and the ratio to reading or copying in the same rounds."""
    found = []
    for outcome in outcomes:
        for case, times, _, records in outcome.of("kernels"):
            size = 4 * math.prod(case["shape"]) / 1e9
            for kernel, tensors in KERNELS.items():
                bound, moved = ("read", 1) if kernel.endswith("moments") else ("copy", 2)
                for path in records[0]["paths"]:
                    seconds = m.total(times, f"{kernel}, {path}")
                    peers = [tensors / moved * s for s in m.total(times, bound)]
                    found.append(
                        {
                            "shape": case["shape"],
                            "layout": case["layout"],
                            "kernel": kernel,
                            "path": path,
                            "GB/s": m.spread([tensors * size / s for s in seconds]),
                            "of": bound,
                            "share": m.ratios(peers, seconds),
                        }
                    )
    return found


def table(rows: list[Record]) -> Table:
    """Return a table with a row per shape, layout and path, and a column per kernel."""
    paths = list(dict.fromkeys(row["path"] for row in rows))
    result = Table(
        title="Kernels, 1 thread, warm memory: GB/s (share of read or copy bandwidth in the same rounds)", title_justify="left"
    )
    for column in ("shape", "layout", "path", *KERNELS):
        result.add_column(column, justify="left" if column in ("shape", "layout", "path") else "right")
    for place in dict.fromkeys((tuple(row["shape"]), row["layout"]) for row in rows):
        for path in paths:
            mine = {r["kernel"]: r for r in rows if (tuple(r["shape"]), r["layout"], r["path"]) == (*place, path)}
            cells = [f"{m.number(mine[k]['GB/s'].middle)} ({mine[k]['share'].middle:.0%})" for k in KERNELS]
            result.add_row(m.sizes(place[0]), place[1], path, *cells)
    return result
