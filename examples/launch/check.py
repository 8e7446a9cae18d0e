"""Run every launcher that works on one machine on two ranks, and print a table of the results: ``make launchers``.

With ``--write`` the table is also written to docs/launchers.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from hvd_syncbn import vectors
from hvd_syncbn.cli.job import end
from hvd_syncbn.cli.stacks import reference_stack

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "launchers.md"
BEGIN, END = "<!-- make launchers writes from here -->", "<!-- to here -->"
LIMIT_S = 300
BIN = Path(sys.executable).parent


class Launcher(NamedTuple):
    """A way to start job.py, and the number of ranks and the transport that it must report."""

    name: str
    version: str
    command: list[str]
    ranks: int
    over: str


def launchers() -> list[Launcher]:
    """Return all launchers that work on one machine."""
    job = [sys.executable, "job.py"]
    horovodrun = ["horovodrun", "-np", "2", "-H", "localhost:2"]
    horovod = f"Horovod {version('horovod')}"
    mpi = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=True).stdout
    mpi = re.sub(r"^mpirun \((.*)\)", r"\1", mpi.splitlines()[0])
    # As horovodrun does: do not bind ranks to cores. In a container the user may be root.
    mpirun = ["mpirun", "--allow-run-as-root", "-np", "2", "-H", "localhost:2", "-bind-to", "none", "-map-by", "slot"]
    return [
        Launcher("none", horovod, job, 1, "MPI"),
        Launcher("`horovodrun --gloo`", horovod, [*horovodrun, "--gloo", *job], 2, "Gloo"),
        Launcher("`horovodrun --mpi`", f"{horovod}, {mpi}", [*horovodrun, "--mpi", *job], 2, "MPI"),
        Launcher("`mpirun`", mpi, [*mpirun, *job], 2, "MPI"),
        Launcher("Ray, `RayExecutor`", f"Ray {version('ray')}", [sys.executable, "ray_job.py"], 2, "Gloo"),
        Launcher(
            "Spark, `horovod.spark.run`",
            f"PySpark {version('pyspark')}",
            ["spark-submit", "--master", "local[2]", "--conf", "spark.ui.enabled=false", "spark_job.py"],
            2,
            "Gloo",
        ),
    ]


def run(launcher: Launcher) -> tuple[str, float, str]:
    """Run the job; return what it reported, its seconds and its output."""
    env = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "120",
        "PYSPARK_PYTHON": sys.executable,
        "RAY_USAGE_STATS_ENABLED": "0",  # send nothing to the network
    }
    with tempfile.TemporaryFile("w+") as file:
        start = time.monotonic()
        process = subprocess.Popen(launcher.command, cwd=HERE, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            timed_out = process.poll() is None
            end(process, 10)
        seconds = time.monotonic() - start
        file.seek(0)
        output = file.read()
    if timed_out:
        return f"ended after {LIMIT_S} s", seconds, output
    if process.returncode:
        return f"exit status {process.returncode}", seconds, output
    found = re.search(r"launched: (.*)", output)
    return found[1].strip() if found else "printed no sha256", seconds, output


def main() -> int:
    """Run all launchers; return 0 if each reported the sha256 of the reference and the expected number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write the table to {PAGE.relative_to(PAGE.parents[1])}")
    write = parser.parse_args().write
    reference = vectors.digest(*reference_stack())
    rows, good = [], True
    for launcher in launchers():
        print(f"{launcher.name}, {launcher.version}: {' '.join(launcher.command)}", flush=True)
        found, seconds, output = run(launcher)
        expected = f"{reference} {launcher.ranks} {launcher.over}"
        equal = found == expected
        good &= equal
        if not equal:
            print(f"{output}\nExpected: {expected}\nReceived: {found}", flush=True)
        sha256 = f"`{found[:16]}`" if re.match(r"[0-9a-f]{64} ", found) else found
        row = [launcher.name, launcher.version, launcher.ranks, launcher.over, sha256, "yes" if equal else "NO", round(seconds)]
        rows.append(f"| {' | '.join(map(str, row))} |")
    today = datetime.datetime.now(datetime.UTC).date()
    where = f"Python {sys.version.split()[0]}, PyTorch {version('torch')}, {os.cpu_count()} cores"
    head = ["| launcher | version | ranks | over | sha256 | equal | seconds |", "|---|---|---:|---|---|---|---:|"]
    said = f"{today}: {where}. The reference in Python gives `{reference}`."
    table = "\n".join([said, "", *head, *rows])
    print(f"\n{table}")
    if write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
