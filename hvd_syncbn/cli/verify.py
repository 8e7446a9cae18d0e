"""``hvd-syncbn verify``: checks that results on this machine or cluster are bitwise identical.

Each framework runs the stack of ``vectors.py`` in separate processes (Horovod supports one framework per process): on one rank
with the global batch and every instruction-set path, or with ``-np`` under ``horovodrun`` or ``torchrun`` with the batch split
between ranks. All results must equal those of the Python reference on the global batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from hvd_syncbn import vectors
from hvd_syncbn.cli import job
from hvd_syncbn.cli.stacks import reference_stack
from hvd_syncbn.horovod import FRAMEWORKS

DESCRIPTION = "Run a training step in every installed framework and layout, and check that results are bitwise identical."
EPILOG = """With -np it runs horovodrun for each framework, on this machine or on the hosts of -H, and splits the batch between
the ranks in several ways. Python, this package and Horovod must be installed at the same paths on every host, and ssh must
work without a password. Exit status: 0 if all results are equal; 1 if they differ or a framework could not run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    job.add_arguments(parser)
    parser.add_argument(
        "--launcher",
        choices=("horovodrun", "torchrun"),
        default="horovodrun",
        help="what starts the ranks of -np; torchrun starts PyTorch's alone, on this host (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the sha256 of every configuration and whether all are equal; return exit status 0 if they are."""
    hosts = job.hosts_of(args)
    if args.launcher == "torchrun" and (hosts is None or args.hosts is not None):
        args.usage_error("--launcher torchrun needs -np, and no -H: it starts ranks on this host")
    found = examine(hosts, args.time_limit, args.launcher)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0 if found["equal"] else 1


def examine(hosts: list[job.Host] | None, limit: float, launcher: str = "horovodrun") -> dict[str, Any]:
    """Run all configurations.

    Args:
        hosts: the result of ``job.place``; None for one process of each framework.
        limit: time limit of each job in seconds.
        launcher: ``"horovodrun"``, or ``"torchrun"`` for PyTorch's ranks on this host.

    Returns:
        The result as ``--json`` prints it, with the keys ``ranks`` (0 without a launcher), ``hosts``, ``machines``,
        ``reference`` (a sha256), ``results``, ``failures``, ``left_out`` and ``equal``.
    """
    frameworks = ("torch",) if launcher == "torchrun" else tuple(FRAMEWORKS)
    installed = [framework for framework in frameworks if importlib.util.find_spec(framework) is not None]
    results: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    machines: list[Any] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("reference", total=1)
        reference = vectors.digest(*reference_stack())
        progress.advance(bar)
        for framework in installed:
            bar = progress.add_task(f"{FRAMEWORKS[framework]}: starting", total=None)

            def note(report: job.Report, framework: str = framework, bar: Any = bar) -> None:
                if "configurations" in report:
                    progress.update(bar, description=FRAMEWORKS[framework], total=report["configurations"])
                elif "sha256" in report:
                    results.append({"framework": framework, **report, "equal": report["sha256"] == reference})
                    progress.advance(bar)
                elif "ranks" in report:
                    machines[:] = [
                        dict(zip(("host", "instructions", "version"), rank, strict=True)) for rank in report["ranks"]
                    ]

            try:
                job.run("paths" if hosts is None else "splits", framework, hosts, limit=limit, launcher=launcher, report=note)
            except job.JobError as error:
                failures[framework] = str(error)
    return {
        "ranks": sum(host.slots for host in hosts or []),
        "hosts": [f"{host.name}:{host.slots}" for host in hosts or []],
        "machines": machines,
        "reference": reference,
        "results": results,
        "failures": failures,
        "left_out": [framework for framework in frameworks if framework not in installed],
        "equal": bool(results) and not failures and all(result["equal"] for result in results),
    }


def show(found: dict[str, Any]) -> None:
    """Print the result as a table and a verdict."""
    console = Console(highlight=False)
    where = f" on {', '.join(found['hosts'])}" if found["ranks"] else ", one process each"
    console.print(f"One training step of a 5-layer stack{where}:")
    console.print("sha256 of outputs, input gradients and running statistics.")
    table = Table()
    for column in ("framework", "configuration", "sha256", "equal"):
        table.add_column(column, no_wrap=True)
    table.add_row("reference", "whole batch, in Python", found["reference"][:16] + "...", "")
    for result in found["results"]:
        sha256 = result["sha256"]
        cells = (FRAMEWORKS[result["framework"]], result["configuration"], sha256[:16] + "..." if len(sha256) == 64 else sha256)
        table.add_row(*cells, Text("yes", "green") if result["equal"] else Text("NO", "red"))
    console.print(table)
    kinds: dict[tuple[str, str], list[str]] = {}
    for machine in found["machines"]:
        kinds.setdefault((machine["instructions"], machine["version"]), []).append(machine["host"])
    for (instructions, version), names in kinds.items():
        hosts = ", ".join(dict.fromkeys(names))
        console.print(f"{len(names)} ranks with instruction set {instructions}, hvd-syncbn {version}: {hosts}")
    for framework in found["left_out"]:
        console.print(f"{FRAMEWORKS[framework]} was skipped because it is not installed")
    for framework, error in found["failures"].items():
        console.print(Text(f"{FRAMEWORKS[framework]} could not run: {error}", "red"), soft_wrap=True)
    different = sum(not result["equal"] for result in found["results"])
    if found["equal"]:
        console.print(Text(f"EQUAL: {len(found['results'])} configurations have one sha256, that of the reference", "green"))
    elif different:
        console.print(Text(f"NOT EQUAL: {different} of {len(found['results'])} configurations differ", "red"))
    elif not found["results"] and not found["failures"]:
        console.print(Text("Neither PyTorch nor TensorFlow is installed. Install one to verify it", "red"))
