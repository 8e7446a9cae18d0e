"""What a user sees of faults: the rows of docs/cluster.md that no other test has."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.jobs import end
from tests.needs import need
from tests.parallel import fork_server
from tests.parallel.job import ROOT, checks, rank_environment, run

FRAMEWORKS = ("torch", "tensorflow")


@pytest.mark.parametrize("check", checks("torch_faults"))
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_job_goes_on(framework: str, check: str) -> None:
    job = run(f"{framework}_faults", 2, HOROVOD_TIMELINE="/dev/full", HOROVOD_STALL_CHECK_TIME_SECONDS="1")
    values = job.values(check)
    if check == "check_no_space_for_the_timeline":
        assert "Error writing to the Horovod Timeline" in job.output
    if check == "check_a_slow_rank":
        assert all(value["seconds"] >= 4 for value in values)
        layer = {"torch": r"Sequential\.2", "tensorflow": r"\w+[._]second"}[framework]
        assert re.search(rf"^(\[0\]<stderr>:)?1: \[\S*hvd_syncbn[._]{layer}\S*forward\S*\]$", job.output, re.MULTILINE)


@pytest.mark.parametrize(("fault", "seconds"), [("exception", 30), ("SIGTERM", 30)])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_job_ends(tmp_path: Path, framework: str, fault: str, seconds: float) -> None:
    """On all ranks, with an error that says why, and nothing is left of it."""
    need(framework, f"horovod.{framework}")
    horovodrun = str(Path(sys.executable).parent / "horovodrun")
    # A signal is for the processes that a user starts.
    rank = [sys.executable, "-m"] if fault == "SIGTERM" else fork_server.command(framework, rank_environment())
    command = [horovodrun, "--gloo", "-np", "2", "-H", "localhost:2", *rank, "tests.parallel.checks.faulty", framework]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "600",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(
            [*command, fault, str(tmp_path)], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            files = [tmp_path / f"rank{rank}" for rank in (0, 1)]
            deadline = time.monotonic() + 90
            while not all(file.exists() and file.read_text() for file in files):
                assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "output").read_text()
                time.sleep(0.05)
            pids = [int(file.read_text().split()[0]) for file in files]
            if fault == "SIGTERM":
                process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=seconds)
        finally:
            end(process)
        output.seek(0)
        said = output.read()
    assert status != 0
    deadline = time.monotonic() + (5 if fault == "exception" else 0)  # its keeper ends a forked rank just after its client
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    if fault == "exception":
        assert "an error between forward and backward" in said
        assert (tmp_path / "error0").exists(), said  # the other rank was told, too
