"""The layer on several ranks compared with other synchronized layers, and a step of a whole network.

A job is as fast as its slowest rank. "ours alone" is our layer without communication, on all ranks at once (each in a process
set of one rank), because ranks share the memory bandwidth. Our synchronized layer cannot be faster than that plus one
allreduce of the packet per direction.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks import layer
from benchmarks import measure as m
from benchmarks.jobs import Outcome
from benchmarks.measure import Framework, FrameworkThatTrains, Record
from hvd_syncbn import native

IMAGES = 16  # of all ranks
NETWORK_IMAGES, NETWORK_SIZE = 2, 32  # per rank


def cases(ranks: int, quick: bool) -> list[dict[str, Any]]:
    """Return cases with the shapes of networks that train on few images per rank; fewer cases on more ranks."""
    images = IMAGES // ranks
    shapes = [(images, *shape[1:]) if len(shape) == 4 else (shape[0] // ranks, *shape[1:]) for shape in layer.SHAPES]
    few = [shapes[3], shapes[6]] if quick else [shapes[2], shapes[3], shapes[6]] if ranks > 2 else shapes
    return [{"kind": "synchronized", "shape": shape, "rounds": 7} for shape in few]


def network_case(rounds: int) -> dict[str, Any]:
    """Return a case with a ResNet-50 on small images."""
    return {"kind": "network", "images": NETWORK_IMAGES, "size": NETWORK_SIZE, "rounds": rounds}


def measure(framework: Framework, shape: list[int], rounds: int) -> Record:
    """Return the times of every contestant and of the packet alone, in the layout of the framework's networks."""
    size = tuple(shape)
    make = {name: partial(framework.step, name, size, framework.layout, "float32") for name in framework.synchronized}
    words = native.packet_size(shape[1])
    make["allreduce"] = partial(framework.allreduce, words)
    make |= {f"allreduce, {engine}": partial(framework.allreduce, words, engine) for engine in framework.engines[1:]}
    steps, errors = m.attempt(make)
    return {"times": m.rounds(steps, errors, rounds, framework.barrier), "errors": errors}


def measure_network(framework: Framework, images: int, size: int, rounds: int) -> Record:
    """Return the times of a network's step with every contestant."""
    names = [name for name in framework.synchronized if name != "ours alone"]  # networks have no lower bound
    make = {name: partial(framework.network, name, images, size) for name in names}
    steps, errors = m.attempt(make)
    return {"times": m.rounds(steps, errors, rounds, framework.barrier), "errors": errors}


def ddp_case(rounds: int) -> dict[str, Any]:
    """Return a case with the same network in DistributedDataParallel."""
    return {"kind": "ddp", "images": NETWORK_IMAGES, "size": NETWORK_SIZE, "rounds": rounds}


def measure_ddp(framework: FrameworkThatTrains, images: int, size: int, rounds: int) -> Record:
    """Return the times of a network's step over torch.distributed, with local norms, ours and one round of floats."""
    steps, errors = m.attempt({name: partial(framework.ddp, name, images, size) for name in ("local", "ours", "one round")})
    return {"times": m.rounds(steps, errors, rounds, framework.barrier), "errors": errors}


def floor(times: m.Times) -> list[float]:
    """Return the lower bound of our time in each round: the layer alone and one allreduce per direction."""
    return [a + b for a, b in zip(m.total(times, "ours alone"), m.total(times, "allreduce"), strict=True)]


CONTROLLERS = {"gloo": "Gloo", "mpi": "MPI"}
CONTESTANTS = (
    "ours alone",
    "allreduce",
    "allreduce, torch.distributed",
    "ours",
    "one round",
    "two rounds",
    "horovod",
    "synchronized",
    "local",
)
PEERS = ("one round", "two rounds", "horovod", "synchronized")


def rows(outcomes: list[Outcome], kind: str) -> list[Record]:
    """Return a row per rank count, framework and shape (or network): times in ms, ratios to ours of the same rounds."""
    found: dict[tuple[Any, ...], Record] = {}
    for outcome in outcomes:
        job = outcome.job
        for case, times, errors, _ in outcome.of(kind):
            what = m.sizes(case["shape"]) if kind == "synchronized" else f"{case['images']} images of {case['size']}"
            over = "Gloo of torch.distributed" if kind == "ddp" else CONTROLLERS[job.controller]
            key = {"ranks": job.ranks, "framework": job.framework, "over": over, "what": what}
            row = found.setdefault(tuple(key.values()), key | {"ms": {}, "ratio": {}, "errors": {}})
            row["errors"] |= errors
            for name in times:
                if name in row["ms"]:
                    continue  # the job with TensorFlow's strategy repeats ours for its ratio
                row["ms"][name] = m.spread([1e3 * seconds for seconds in m.total(times, name)])
                if "ours" in times:
                    row["ratio"][name] = m.ratios(m.total(times, name), m.total(times, "ours"))
            if kind == "synchronized" and {"ours", "ours alone", "allreduce"} <= times.keys():
                row["of floor"] = m.ratios(m.total(times, "ours"), floor(times))
    return list(found.values())


def table(title: str, rows: list[Record]) -> Table:
    """Return a table of milliseconds of forward and backward, and of their ratios to ours."""
    result = Table(title=title, title_justify="left", caption="ms, median (quartiles); in brackets: times ours, same rounds")
    result.add_column("ranks")
    for column in ("framework", "over", "per rank"):
        result.add_column(column)
    columns = [name for name in CONTESTANTS if any(name in row["ms"] or name in row["errors"] for row in rows)]
    for name in columns:
        result.add_column(name if name in ("local", "horovod") else m.label("torch", name), justify="right")
    if any("of floor" in row for row in rows):
        result.add_column("ours / (alone + allreduce)", justify="right")
    for row in rows:
        cells = [str(row["ranks"]), m.FRAMEWORKS[row["framework"]], row["over"], row["what"]]
        for name in columns:
            if name in row["ms"]:
                times = "" if name == "ours" else f"\n[{m.number(row['ratio'][name].middle)}x]"
                cells.append(f"{row['ms'][name]}{times}")
            else:
                cells.append("failed" if name in row["errors"] else "")
        if "of floor" in row:
            cells.append(f"{row['of floor']}x")
        result.add_row(*(Text(cell) for cell in cells))
    return result


def failures(rows: list[Record]) -> list[str]:
    """Return a line for each contestant that failed."""
    return sorted({f"{m.FRAMEWORKS[row['framework']]}, {m.label(row['framework'], name)}: {error}"
                   for row in rows for name, error in row["errors"].items()})  # fmt: skip
