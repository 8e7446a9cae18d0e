"""The overhead of a call besides its kernels, on a tiny input, and the memory that autograd keeps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import measure as m
from benchmarks.jobs import Outcome
from benchmarks.measure import Framework, FrameworkThatTrains, Record, Step
from hvd_syncbn import native

SHAPE = (1, 8, 2, 2)
SAVED_SHAPE = (8, 64, 32, 32)


def cases(quick: bool) -> list[dict[str, Any]]:
    """Return the only case."""
    return [{"kind": "overhead", "rounds": 15 if quick else 51}]


def measure(framework: Framework, rounds: int) -> Record:
    """Return the times of one layer for each direction, and of the kernels alone."""
    make = {name: partial(framework.chain, name, SHAPE) for name in framework.local} | {
        "kernels": partial(_kernels, framework.depth)
    }
    steps, errors = m.attempt(make)
    times = m.rounds(steps, errors, rounds)
    return {
        "times": {name: [[s / framework.depth for s in parts] for parts in times[name]] for name in times},
        "errors": errors,
    }


def _kernels(depth: int) -> Step:
    """Return a step with an adapter's calls of the core, made through ctypes."""
    lib = native.library()
    samples, channels, *spatial = SHAPE
    shape = native.shape(samples, channels, int(np.prod(spatial)), "float32")
    ref, eps = ctypes.byref(shape), ctypes.c_double(m.EPS)
    begin = ctypes.c_int64(0)
    moments, apply = (ctypes.c_int64(getattr(lib, f"hvd_syncbn_{n}_units")(ref)) for n in ("moments", "apply"))
    count = ctypes.c_int64(samples * int(np.prod(spatial)))
    x, dy, y, dx = (np.random.default_rng(0).standard_normal(SHAPE, np.float32) for _ in range(4))
    packet = np.zeros(native.packet_size(channels), np.int64)
    stats = np.empty((2, channels))
    coefficients = np.empty(lib.hvd_syncbn_coefficients_size(ref), np.uint8)
    ones = [np.ones(channels, np.float32) for _ in range(6)]
    X, DY, Y, DX, PACKET, STATS, COEFFICIENTS = (
        native._pointer(array) for array in (x, dy, y, dx, packet, stats, coefficients)
    )
    gamma, beta, mean, variance, dgamma, dbeta = (native._vector(array) for array in ones)
    running = native.Running(mean, variance, 0.9, 0.1, 1, 1)
    one, no = ctypes.c_int64(1), ctypes.c_int32(0)

    def forward() -> None:
        packet.fill(0)
        lib.hvd_syncbn_forward_moments(ref, X, None, begin, moments, PACKET)
        lib.hvd_syncbn_forward_close(ref, eps, one, count, PACKET)
        lib.hvd_syncbn_check_packet(native.FORWARD, PACKET)
        lib.hvd_syncbn_forward_finish(ref, eps, PACKET, gamma, beta, running, STATS, COEFFICIENTS)
        lib.hvd_syncbn_forward_apply(ref, X, None, no, COEFFICIENTS, begin, apply, Y)

    def backward() -> None:
        packet.fill(0)
        lib.hvd_syncbn_backward_moments(ref, X, DY, None, STATS, begin, moments, PACKET)
        lib.hvd_syncbn_backward_close(ref, STATS, count, PACKET)
        lib.hvd_syncbn_backward_params(ref, PACKET, STATS, dgamma, dbeta)
        lib.hvd_syncbn_check_packet(native.BACKWARD, PACKET)
        lib.hvd_syncbn_backward_finish(ref, PACKET, STATS, gamma, COEFFICIENTS)
        lib.hvd_syncbn_backward_apply(ref, X, DY, None, None, COEFFICIENTS, begin, apply, DX, None)

    forwards, backwards = (m.timed(partial(_repeat, call, depth)) for call in (forward, backward))
    return lambda: forwards() + backwards()


def _repeat(call: Callable[[], None], times: int) -> None:
    for _ in range(times):
        call()


def measure_memory(framework: FrameworkThatTrains) -> Record:
    """Return the bytes that autograd keeps from a layer's forward for its backward, by kind."""
    found = {}
    for name in framework.synchronized[1:-1]:
        for relu in (False, True):
            found[name + ", relu" * relu] = framework.saved(name, SAVED_SHAPE, relu)
    return {"found": found, "errors": {}}


def rows(outcomes: list[Outcome]) -> list[Record]:
    """Return a row per framework and direction, in microseconds per call."""
    found = []
    for outcome in outcomes:
        for _, times, _, _ in outcome.of("overhead"):
            for i, direction in enumerate(("forward", "backward")):
                micro = {name: [1e6 * parts[i] for parts in times[name]] for name in times}
                row: Record = {"framework": outcome.job.framework, "direction": direction}
                row["us"] = {name: m.spread(values) for name, values in micro.items()}
                row["overhead us"] = m.spread([a - b for a, b in zip(micro["ours"], micro["kernels"], strict=True)])
                found.append(row)
    return found


def memory_rows(outcomes: list[Outcome]) -> list[Record]:
    """Return a row per layer: the bytes that autograd keeps."""
    return [
        {"contestant": name, "bytes": kept}
        for outcome in outcomes
        for *_, ranks in outcome.of("memory")
        for name, kept in ranks[0]["found"].items()
    ]


def table(rows: list[Record]) -> Table:
    """Return a table of the overhead."""
    result = Table(
        title=f"Microseconds of one layer on {m.sizes(SHAPE)}, median (quartiles)",
        title_justify="left",
        caption="per layer of a chain of 20: modules in eager PyTorch, a graph in TensorFlow. Overhead: ours minus its kernels",
    )
    for column in ("framework", "direction", "ours", "kernels alone", "overhead", "framework's own layer"):
        result.add_column(column, justify="left" if column in ("framework", "direction") else "right")
    for row in rows:
        us = row["us"]
        cells = map(str, (us["ours"], us["kernels"], row["overhead us"], us["local"]))
        result.add_row(m.FRAMEWORKS[row["framework"]], row["direction"], *cells)
    return result


def memory_table(rows: list[Record]) -> Table:
    """Return a table of the memory in KiB."""
    kinds = list(rows[0]["bytes"]) if rows else []
    result = Table(title=f"KiB that autograd keeps, {m.sizes(SAVED_SHAPE)} float32, PyTorch", title_justify="left")
    result.add_column("layer")
    for kind in kinds:
        result.add_column(kind, justify="right")
    for row in rows:
        result.add_row(row["contestant"], *(f"{row['bytes'][kind] / 1024:g}" for kind in kinds))
    return result
