"""One packet on several ranks with nothing set, beside a bare exchange of the same bytes between the same ranks.

The bare exchange copies, synchronizes and sums as little as two processes can: through shared memory or over a TCP socket, on
which both spin. `docs/performance.md` has the results.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import measure as m
from benchmarks.jobs import Job, Outcome, first_address
from benchmarks.measure import Framework, Record, Step
from hvd_syncbn import native

CHANNELS = (8, 512, 2048)  # 1, 70 and 280 kB
GOALS = {8: 0.05, 512: 0.08, 2048: 0.15}  # ms of a packet by its channels
TAIL_GOAL = 1.0  # ms, 99th percentile
BARE_GOAL = 2.0  # times the bare exchange, after OVERHEAD
OVERHEAD = 0.02  # ms
SHARED_CORES_GOAL = 1.6  # ms, with more ranks than cores
SETS_GOAL = 1.2  # times the packet of all ranks
PACKET, SET = "packet", "packet of a process set"
MEMORY, SOCKET, ROUND_TRIP = "bare, shared memory", "bare, socket", "bare round trip, socket"
MEET_SECONDS = 30


def cases(rounds: int, *contestants: str) -> list[dict[str, Any]]:
    """Return a case; bare exchanges need exactly two ranks, and one host if they are through shared memory."""
    # The ranks meet at files of this name.
    name = f"hvd-syncbn-bench-{os.getpid()}"
    return [{"kind": "latency", "channels": CHANNELS, "rounds": rounds, "contestants": contestants, "name": name}]


def measure(framework: Framework, channels: list[int], rounds: int, contestants: list[str], name: str) -> Record:
    """Return the times of every contestant for every packet."""
    maker: dict[str, Callable[[int], Step]] = {
        PACKET: framework.allreduce,
        SET: framework.set_allreduce,
        MEMORY: partial(_through_memory, framework.rank, name),
        SOCKET: partial(_over_socket, framework.rank, name, False),
        ROUND_TRIP: partial(_over_socket, framework.rank, f"{name}-round-trip", True),
    }
    make = {
        f"{contestant}, {c}": partial(maker[contestant], native.packet_size(c)) for c in channels for contestant in contestants
    }
    steps, errors = m.attempt(make)
    return {"times": m.rounds(steps, errors, rounds, framework.barrier), "errors": errors}


def _meet(path: Path) -> str:
    """Return the text of a file that rank 0 writes, and remove it."""
    deadline = time.monotonic() + MEET_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 did not write {path} within {MEET_SECONDS} s")
        time.sleep(0.01)
    text = path.read_text()
    path.unlink()
    return text


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def _twice(exchange: Callable[[], object]) -> Step:
    once = m.timed(exchange)
    return lambda: once() + once()


def _through_memory(rank: int, name: str, words: int) -> Step:
    """Each rank copies its words, sets its number, waits for the other's, and adds: two buffers per rank, used in turn."""
    path = Path(f"/dev/shm/{name}-{words}")
    header = mmap.PAGESIZE
    if rank == 0:
        place = path.with_suffix(".memory")
        place.write_bytes(bytes(header + 4 * 8 * words))
        _write(path, str(place))
    else:
        place = Path(_meet(path))
    with place.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    flags = np.frombuffer(memory, np.int64, header // 8)
    own_flag, other_flag = flags[16 * rank : 16 * rank + 1], flags[16 * (1 - rank) : 16 * (1 - rank) + 1]
    buffers = np.frombuffer(memory, np.int64, offset=header).reshape(2, 2, words)
    packet, total = np.zeros(words, np.int64), np.zeros(words, np.int64)
    count = 0

    def exchange() -> None:
        nonlocal count
        count += 1
        mine, other = buffers[rank, count % 2], buffers[1 - rank, count % 2]
        mine[:] = packet
        own_flag[0] = count
        while other_flag[0] < count:
            pass
        np.add(mine, other, out=total)

    exchange()  # both have mapped it
    if rank == 0:
        place.unlink()
    return _twice(exchange)


def _over_socket(rank: int, name: str, round_trip: bool, words: int) -> Step:
    """Each rank sends its words and adds the other's, at the same time or, in a round trip, rank 1 after rank 0; both spin."""
    path = Path(f"/tmp/{name}-{words}")
    if rank == 0:
        with socket.create_server((first_address(), 0)) as server:
            server.settimeout(MEET_SECONDS)
            _write(path, f"{server.getsockname()[0]}:{server.getsockname()[1]}")
            link, _ = server.accept()
    else:
        host, port = _meet(path).split(":")
        link = socket.create_connection((host, int(port)), MEET_SECONDS)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setblocking(False)
    packet, other, total = (np.zeros(words, np.int64) for _ in range(3))
    sent, received = memoryview(packet.data).cast("B"), memoryview(other.data).cast("B")

    def move(left: memoryview, missing: memoryview) -> None:
        while left or missing:
            if left:
                with contextlib.suppress(BlockingIOError):
                    left = left[link.send(left) :]
            if missing:
                with contextlib.suppress(BlockingIOError):
                    missing = missing[link.recv_into(missing) :]

    def exchange() -> None:
        if not round_trip:
            move(sent, received)
        elif rank == 0:
            move(sent, received[:0])
            move(sent[:0], received)
        else:
            move(sent[:0], received)
            move(sent, received[:0])
        np.add(packet, other, out=total)

    return _twice(exchange)


def rows(outcomes: list[Outcome]) -> list[Record]:
    """Return a row per job and packet: milliseconds of every contestant, medians with quartiles, and the packet's tail."""
    found = []
    for outcome in outcomes:
        for case, times, _, _ in outcome.of("latency"):
            for channels in case["channels"]:
                ms = {
                    contestant: [1e3 * part for parts in times[f"{contestant}, {channels}"] for part in parts]
                    for contestant in case["contestants"]
                    if f"{contestant}, {channels}" in times
                }
                found.append(
                    {
                        "job": outcome.job.title,
                        "framework": outcome.job.framework,
                        "ranks": outcome.job.ranks,
                        "hosts": outcome.job.hosts,
                        "channels": channels,
                        "bytes": 8 * native.packet_size(channels),
                        "ms": {name: m.spread(values) for name, values in ms.items()},
                        "tail ms": {name: float(np.quantile(values, 0.99)) for name, values in ms.items()},
                    }
                )
    return found


def table(rows: list[Record]) -> Table:
    """Return a table with a row per job and packet."""
    result = Table(
        title="One packet, nothing set: ms, median / 99th percentile",
        title_justify="left",
        caption=f"goals of a packet: {', '.join(f'{goal:g} ms' for goal in GOALS.values())} by size on two ranks of one host",
    )
    result.add_column("job")
    columns = [name for name in (PACKET, SET, MEMORY, SOCKET, ROUND_TRIP) if any(name in row["ms"] for row in rows)]
    for column in ("kB", *columns):
        result.add_column(column, justify="right")
    for row in rows:
        cells = [
            f"{m.number(row['ms'][name].middle)} / {m.number(row['tail ms'][name])}" if name in row["ms"] else ""
            for name in columns
        ]
        result.add_row(row["job"], f"{row['bytes'] / 1e3:.3g}", *cells)
    return result


def jobs(quick: bool, has_mpi: bool) -> list[Job]:
    """Return the jobs: two ranks in each framework, over MPI where Horovod has it, three ranks, process sets, and two hosts."""
    bare = cases(300 if quick else 500, PACKET, MEMORY, SOCKET)
    found = [Job(f"{name}, 2 ranks, packets", framework, bare, 2) for framework, name in m.FRAMEWORKS.items()]
    if has_mpi:
        found.append(Job("PyTorch, 2 ranks, packets, MPI", "torch", bare, 2, controller="mpi"))
    if not quick:
        found.append(Job("PyTorch, 3 ranks, packets", "torch", cases(300, PACKET), 3))
        found.append(Job("PyTorch, 4 ranks in 4 process sets, packets", "torch", cases(300, PACKET, SET), 4, sets=True))
        found.append(Job("PyTorch, 2 hosts, packets", "torch", cases(500, PACKET, ROUND_TRIP), 2, hosts=2))
    return found
