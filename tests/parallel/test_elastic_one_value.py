"""An elastic job in which each rank has one value per channel, as in an image pooling branch, and one of two workers dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hvd_syncbn.cli.job import end
from tests.parallel.job import ROOT, rank_environment

pytest.importorskip("horovod.torch")

ADVICE = "start it with `horovodrun --min-np 2` or more, "


def run(folder: Path, *options: str) -> tuple[int, str]:
    """The job's status and what it printed."""
    horovodrun = str(Path(sys.executable).parent / "horovodrun")
    command = [horovodrun, "--gloo", "-np", "2", "--max-np", "2", "-H", "localhost:1,127.0.0.1:1", "--network-interface", "lo"]
    command += ["--start-timeout", "200", "--elastic-timeout", "200", *options]
    command += [sys.executable, "-m", "tests.parallel.checks.elastic_one_value", str(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=rank_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=200)[0]
    finally:
        end(process)
    assert (folder / "killed").exists(), output[-8000:]
    return process.returncode, output


@pytest.mark.timeout(300)
def test_the_survivor_is_told_what_to_do(tmp_path: Path) -> None:
    """It does not try the same batch again and again: the job ends."""
    status, output = run(tmp_path, "--min-np", "1")
    assert status != 0, output[-8000:]
    assert "Expected more than 1 value per channel when training" in output and "'pooling'" in output, output[-8000:]
    assert output.count(ADVICE) == 1, output[-8000:]


@pytest.mark.timeout(300)
def test_it_waits_where_the_job_needs_two(tmp_path: Path) -> None:
    """As the message says: the survivor waits for a new worker, and both finish."""
    status, output = run(tmp_path, "--min-np", "2", "--blacklist-cooldown-range", "2", "3")
    assert status == 0, output[-8000:]
    assert all(f"rank {rank} of 2 is at step 8" in output for rank in (0, 1)), output[-8000:]
    assert "more than 1 value" not in output
