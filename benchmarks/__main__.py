"""Runs the benchmarks: `python -m benchmarks [--quick]`. Prints tables; writes figures and plots to benchmarks/results/.

Every framework, thread count and rank count runs in separate processes. Within a process all contestants are called in turn,
so changes of the machine's speed affect all of them. Ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import accuracy, cost_model, goals, jobs, kernels, latency, layer, overhead, plots, settings, synchronized
from benchmarks import measure as m
from benchmarks.jobs import Job, Outcome
from hvd_syncbn import __version__, native
from hvd_syncbn.cli.cost_model import Point, fit
from hvd_syncbn.cli.doctor import WARM_MEMORY

RESULTS = Path(__file__).parent / "results"


@cache
def has_mpi() -> bool:
    """Return whether this Horovod can run over MPI."""
    code = "import horovod.torch as hvd; print(hvd.mpi_built())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    return "True" in said and shutil.which("mpirun") is not None


def plan(quick: bool) -> list[Job]:
    """Return the jobs in the order in which they run."""
    found = []
    for threads in (1,) if quick else (1, 2):
        for framework, name in m.FRAMEWORKS.items():
            cases = layer.cases(quick, threads)
            if threads == 1:
                cases += overhead.cases(quick)
            if threads == 1 and framework == "torch":
                cases += [*layer.exact_sums_cases(quick), {"kind": "memory"}]
            title = f"{name}, {threads} thread{'s' * (threads > 1)}"
            found.append(Job(title, framework, cases, threads=threads, pin=True))
    cases = [*layer.warm_cases(quick), *kernels.cases(quick)]
    found.append(Job("PyTorch, warm memory, and kernels", "torch", cases, pin=True, environment=WARM_MEMORY))
    for ranks in (2,) if quick else (2, 4):
        for framework, name in m.FRAMEWORKS.items():
            cases = [*synchronized.cases(ranks, quick), *(accuracy.cases() if ranks == 2 else [])]
            packets = [settings.packets_case(31)] if framework == "torch" and not quick else []
            title = f"{name}, {ranks} ranks"
            mine = [Job(title, framework, cases + packets, ranks, environment=settings.SHORT_CYCLE)]
            networks = [] if quick or ranks > 2 else [synchronized.network_case(3)]
            if networks:
                ddp = [synchronized.ddp_case(3)] if framework == "torch" else []
                mine.append(Job(f"{title}, networks", framework, networks + ddp, ranks))
            found += mine
            if ranks == 2 and has_mpi():
                found += [replace(job, title=f"{job.title}, MPI", controller="mpi") for job in mine]
            if framework == "tensorflow" and not quick:
                found.append(Job(f"{name}'s own strategy, {ranks} ranks", framework, cases + networks, ranks, strategy=True))
    found += latency.jobs(quick, has_mpi())
    if not quick:
        cases = [settings.packets_case(31)]
        found.append(Job("PyTorch, 3 ranks", "torch", cases, 3, environment=settings.SHORT_CYCLE))
        for title, setting in settings.SETTINGS.items():
            if setting.controller == "mpi" and not has_mpi():
                continue
            training = [settings.training_case(3)] if setting.training else []
            cases = [settings.packets_case(31), *training]
            job = Job(title, "torch", cases, 2, pin=setting.pin, environment=setting.environment, controller=setting.controller)
            found.append(job)
    return found


def run(plan: list[Job], console: Console) -> list[Outcome]:
    """Run all jobs with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    outcomes = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(len(job.cases) for job in plan))
        for job in plan:
            progress.update(task, description=job.title)
            outcomes.append(jobs.run(job, lambda cases: progress.advance(task, cases)))
            if outcomes[-1].error:
                progress.console.print(f"[red]{job.title}:[/] ", outcomes[-1].error, markup=True, soft_wrap=True)
        progress.update(task, description="All jobs")
    return outcomes


def collect(outcomes: list[Outcome]) -> dict[str, list[m.Record]]:
    """Return the rows of every section."""
    return {
        "layer": layer.rows(outcomes),
        "kernels": kernels.rows(outcomes),
        "exact sums": layer.exact_sums_rows(outcomes),
        "overhead": overhead.rows(outcomes),
        "memory": overhead.memory_rows(outcomes),
        "synchronized": synchronized.rows(outcomes, "synchronized"),
        "network": synchronized.rows(outcomes, "network"),
        "ddp": synchronized.rows(outcomes, "ddp"),
        "latency": latency.rows(outcomes),
        "packets": settings.packet_rows(outcomes),
        "training": settings.training_rows(outcomes),
        "accuracy": accuracy.rows(outcomes),
    }


def points(packets: list[m.Record]) -> list[Point]:
    """Return (ranks, bytes, seconds) of the packets measured with a short cycle on every number of ranks."""
    titles = [f"PyTorch, {ranks} ranks" for ranks in (2, 3, 4)]
    return [(row["ranks"], row["bytes"], row["ms"].middle / 1e3) for row in packets if row["setting"] in titles]


def tables(results: dict[str, list[m.Record]]) -> Iterable[Any]:
    """Yield the tables and messages to print."""
    for framework in m.FRAMEWORKS:
        yield layer.table(results["layer"], framework)
    yield kernels.table(results["kernels"])
    yield overhead.table(results["overhead"])
    if results["memory"]:
        yield overhead.memory_table(results["memory"])
    title = f"Synchronized layer, forward and backward, HOROVOD_CYCLE_TIME={settings.CYCLE_TIME}"
    yield synchronized.table(title, results["synchronized"])
    if results["network"]:
        yield synchronized.table("Forward and backward of a ResNet-50, nothing set", results["network"])
    if results["ddp"]:
        yield synchronized.table("Forward and backward of a ResNet-50 in DistributedDataParallel", results["ddp"])
    yield from synchronized.failures(results["synchronized"] + results["network"] + results["ddp"])
    yield latency.table(results["latency"])
    if results["training"]:
        yield settings.table(results["packets"], results["training"])
    if points(results["packets"]):
        yield cost_model.check_table(points(results["packets"]), fit(points(results["packets"])))
    yield accuracy.table(results["accuracy"])
    yield goals.table(goals.goals(results))


def about() -> dict[str, Any]:
    """Return a description of the machine and the installed versions."""
    model = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    owners = packages_distributions()  # TensorFlow's package has several names
    modules = ("torch", "tensorflow", "keras", "tf_keras", "horovod", "numpy")
    return {
        "processor": model[0] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "instruction set": native.isa(),
        "load before": os.getloadavg(),
        "versions": {"hvd_syncbn": __version__} | {name: version(owners[name][0]) for name in modules if name in owners},
    }


def main() -> None:
    """Run all benchmarks, print the tables and save the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 ranks, fewer shapes and rounds: about a minute")
    args = parser.parse_args()
    # Wide enough for the tables if the output is a file.
    console = Console() if Console().is_terminal else Console(width=220)
    machine, start = about(), time.monotonic()
    outcomes = run(plan(args.quick), console)
    results = collect(outcomes)
    for item in tables(results):
        console.print(item)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "results.json"
    run_jobs = [
        {
            "job": outcome.job.title,
            "seconds": round(outcome.seconds, 1),
            "cases": [round(records[0]["seconds"], 1) for records in outcome.records],
            "error": outcome.error,
        }
        for outcome in outcomes
    ]
    path.write_text(json.dumps({"about": machine, "jobs": run_jobs, **results}, indent=1) + "\n")
    console.print(f"{time.monotonic() - start:.0f} s. Figures: {path}")
    for picture in plots.draw(results, RESULTS):
        console.print(f"Plot: {picture}")


if __name__ == "__main__":
    main()
