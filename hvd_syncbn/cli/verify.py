"""``hvd-syncbn verify``: checks that results on this machine or cluster are bitwise identical.

Each framework runs the stack of ``vectors.py`` in separate processes (Horovod supports one framework per process): on one rank
with the global batch and every instruction-set path, or with ``-np`` under a launcher with the batch split between ranks, or
under all launchers. All results must equal those of the Python reference on the global batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from typing import Any, NamedTuple

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
work without a password. --launcher torchrun, mirrored and multiworker run PyTorch over torch.distributed, and TensorFlow under
MirroredStrategy and MultiWorkerMirroredStrategy. --launcher all runs one process and every launcher that is installed, on 1, 2
and 4 ranks or on -np. Exit status: 0 if all results are equal; 1 if they differ or a framework could not run."""


class Run(NamedTuple):
    """One job: a framework in one process (``launcher`` is empty), or on the ranks of a launcher."""

    framework: str
    launcher: str = ""
    hosts: list[job.Host] | None = None

    @property
    def ranks(self) -> int:
        """The number of ranks; 0 without a launcher."""
        return sum(host.slots for host in self.hosts or [])

    @property
    def task(self) -> str:
        """The task of ``rank.py``."""
        return {"": "paths", "mirrored": "replicas", "multiworker": "replicas"}.get(self.launcher, "splits")


RANKS = (1, 2, 4)
"""Numbers of ranks of ``--launcher all``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    job.add_arguments(parser, (*job.LAUNCHERS, "all"))


def run(args: argparse.Namespace) -> int:
    """Print the sha256 of every configuration and whether all are equal; return exit status 0 if they are."""
    found = examine(args.launcher, job.hosts_of(args), args.time_limit)
    if args.json:
        print(json.dumps(found, indent=1))
    elif args.launcher == "all":
        show_launchers(found)
    else:
        show(found)
    return 0 if found["equal"] else 1


def plan(launcher: str, hosts: list[job.Host] | None) -> tuple[list[Run], list[str]]:
    """Return the jobs, and what is not installed and therefore left out.

    Args:
        launcher: a name in ``job.LAUNCHERS``, or ``"all"``.
        hosts: the result of ``job.place``; None for one process of each framework, or with ``"all"`` for 1, 2 and 4 ranks.
    """
    runs_all = launcher == "all"
    names = FRAMEWORKS if runs_all or hosts is None else job.LAUNCHERS[launcher]
    installed = [framework for framework in names if importlib.util.find_spec(framework) is not None]
    left_out = [framework for framework in names if framework not in installed]
    if not runs_all:
        return [Run(framework, launcher if hosts else "", hosts) for framework in installed], left_out
    launchers = dict(job.LAUNCHERS)
    if importlib.util.find_spec("horovod") is None:
        del launchers["horovodrun"]
        left_out.append("horovod")
    runs = [Run(framework) for framework in installed]
    for name, frameworks in launchers.items():
        for framework in filter(installed.__contains__, frameworks):
            runs += [Run(framework, name, place) for place in ([hosts] if hosts else [job.place(n, None) for n in RANKS])]
    return runs, left_out


def examine(launcher: str, hosts: list[job.Host] | None, limit: float) -> dict[str, Any]:
    """Run all configurations.

    Args:
        launcher: as in ``plan``.
        hosts: as in ``plan``.
        limit: time limit of each job in seconds.

    Returns:
        The result as ``--json`` prints it, with the keys ``ranks`` (0 without a number of ranks), ``hosts``, ``machines``,
        ``reference`` (a sha256), ``results``, ``failures``, ``left_out`` and ``equal``.
    """
    results: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    machines: list[Any] = []
    runs, left_out = plan(launcher, hosts)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("reference", total=1)
        reference = vectors.digest(*reference_stack())
        progress.advance(bar)
        for one in runs:
            title = FRAMEWORKS[one.framework]
            if launcher == "all":
                title += f", {one.launcher}, {one.ranks} ranks" if one.launcher else ", one process"
            bar = progress.add_task(f"{title}: starting", total=None)

            def note(report: job.Report, one: Run = one, title: str = title, bar: Any = bar) -> None:
                if "configurations" in report:
                    progress.update(bar, description=title, total=report["configurations"])
                elif "sha256" in report:
                    where = {"framework": one.framework, "launcher": one.launcher, "ranks": one.ranks}
                    results.append({**where, **report, "equal": report["sha256"] == reference})
                    progress.advance(bar)
                elif "ranks" in report:
                    machines[:] = [
                        dict(zip(("host", "instructions", "version"), rank, strict=True)) for rank in report["ranks"]
                    ]

            try:
                job.run(one.task, one.framework, one.hosts, limit=limit, launcher=one.launcher, report=note)
            except job.JobError as error:
                failures[title] = str(error)
    return {
        "ranks": sum(host.slots for host in hosts or []),
        "hosts": [f"{host.name}:{host.slots}" for host in hosts or []],
        "machines": machines,
        "reference": reference,
        "results": results,
        "failures": failures,
        "left_out": left_out,
        "equal": bool(results) and not failures and all(result["equal"] for result in results),
    }


def show_launchers(found: dict[str, Any]) -> None:
    """Print a table with a row for each framework, launcher and layout and a column for each split, and a verdict."""
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    console.print("One training step of a 5-layer stack: sha256 of outputs, input gradients and running statistics.")
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in found["results"]:
        rows.setdefault((result["framework"], result["launcher"], result["layout"]), []).append(result)
    table = Table()
    for column in ("framework", "launcher", "ranks", "layout", "whole", *vectors.SPLITS):
        table.add_column(column, no_wrap=True)
    for (framework, launcher, layout), results in rows.items():
        ranks = ", ".join(map(str, sorted({result["ranks"] or 1 for result in results})))
        cells = [_digest_of([r for r in results if r.get("split") == split]) for split in (None, *vectors.SPLITS)]
        table.add_row(FRAMEWORKS[framework], launcher or "one process", ranks, layout.replace("_", " "), *cells)
    console.print(table)
    different = [result for result in found["results"] if not result["equal"]]
    for result in different:
        where = f"{result['launcher'] or 'one process'}, {result['ranks'] or 1} ranks, {result['configuration']}"
        console.print(Text(f"{FRAMEWORKS[result['framework']]}, {where}: {result['sha256']}", "red"), soft_wrap=True)
    _show_verdict(console, found)
    if found["equal"]:
        console.print(f"sha256 {found['reference']}", soft_wrap=True)


def _digest_of(results: list[dict[str, Any]]) -> Text:
    """Return the digest that all results have, in short; empty if there are none."""
    if all(result["equal"] for result in results):
        return Text(results[0]["sha256"][:8] if results else "", "green")
    return Text(f"NO: {sum(not result['equal'] for result in results)} of {len(results)}", "red")


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
    _show_verdict(console, found)


def _show_verdict(console: Console, found: dict[str, Any]) -> None:
    for name in found["left_out"]:
        console.print(f"{FRAMEWORKS.get(name, name.capitalize())} was skipped because it is not installed")
    for title, error in found["failures"].items():
        console.print(Text(f"{title} could not run: {error}", "red"), soft_wrap=True)
    different = sum(not result["equal"] for result in found["results"])
    if found["equal"]:
        console.print(Text(f"EQUAL: {len(found['results'])} configurations have one sha256, that of the reference", "green"))
    elif different:
        console.print(Text(f"NOT EQUAL: {different} of {len(found['results'])} configurations differ", "red"))
    elif not found["results"] and not found["failures"]:
        console.print(Text("Neither PyTorch nor TensorFlow is installed. Install one to verify it", "red"))
