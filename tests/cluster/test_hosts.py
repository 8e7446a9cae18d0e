"""Plain jobs on several hosts give the bytes of one process; and the hosts leave nothing behind, whatever ends a test."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.jobs import end
from hvd_syncbn import vectors
from hvd_syncbn.cli import stacks
from tests.cluster.hosts import ETC, Hosts, namespaces, pids

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def run_command(hosts: Hosts, *arguments: str, ranks: str = "h1:2,h2:2") -> dict[str, Any]:
    """What `hvd-syncbn ... --json` says, started on the first host as a user does."""
    command = hosts.command("h1", [sys.executable, "-m", "hvd_syncbn.cli", *arguments, "-np", "4", "-H", ranks, "--json"])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=280)
    finally:
        end(process)
    assert process.returncode == 0, output + errors
    found: dict[str, Any] = json.loads(output)
    assert found["machines" if arguments[0] == "verify" else "hosts"], output
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ranks", "where"),
    [
        ("h1:2,h2:2", ["h1", "h1", "h2", "h2"]),
        pytest.param("h1:1,h2:1,h3:1,h4:1", ["h1", "h2", "h3", "h4"], marks=pytest.mark.matrix),
    ],
)
def test_verify(hosts: Hosts, ranks: str, where: list[str]) -> None:
    """`horovodrun -np 4 -H h1:2,h2:2` in both frameworks, for every split of the batch: the sha256 of the reference.

    It is one process's, too: tests/unit/test_cli.py.
    """
    found = run_command(hosts, "verify", ranks=ranks)
    assert (found["ranks"], found["hosts"], found["failures"]) == (4, ranks.split(","), {})
    assert [machine["host"] for machine in found["machines"]] == where
    kinds = [(result["framework"], result["configuration"].split(",")[0]) for result in found["results"]]
    assert set(kinds) == set(itertools.product(("torch", "tensorflow"), vectors.SPLITS))
    assert {result["sha256"] for result in found["results"]} == {vectors.digest(*stacks.reference_stack())}


@pytest.mark.timeout(300)
def test_groups_of_torchrun(hosts: Hosts) -> None:
    """`groups()` under torchrun on two hosts, one agent each: the ranks of a host share a batch, with one process's bytes."""
    address = hosts.address("h1")
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", address, "--master-port", "29511"]
    agents = [
        hosts.start(
            host,
            [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--node-rank", str(number),
             "-m", "tests.cluster.torchrun_groups"],
            cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for number, host in enumerate(("h1", "h2"))
    ]  # fmt: skip
    try:
        printed = [agent.communicate(timeout=240)[0] for agent in agents]
    finally:
        for agent in agents:
            end(agent)
    line = next((line for line in printed[0].splitlines() if line.startswith("[[")), None)
    assert line is not None, "\n".join(printed)
    want = vectors.digest(*stacks.reference_stack())
    assert json.loads(line) == [["h1", [0, 1], want]] * 2 + [["h2", [2, 3], want]] * 2


@pytest.mark.matrix
@pytest.mark.timeout(300)
def test_doctor(hosts: Hosts) -> None:
    found = run_command(hosts, "doctor")
    assert len(found["packets"]) >= 3 and found["controller"] in ("Gloo", "MPI")


def test_no_file_of_the_user_is_read(hosts: Hosts) -> None:
    """A shell killed in the middle of the user's .bashrc must not leave traces there."""
    command = hosts.command("h1", ["ssh", "h2", "ls -A ~; echo $HOME"])
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert hosts.prefix in output and ".bashrc" not in output and str(Path.home()) not in output.split()


PROGRAM = """
import subprocess, sys
from tests.cluster.hosts import Hosts
with Hosts(2) as hosts:
    process = hosts.start("h1", ["ssh", "h2", "sleep 600 & sleep 600"])
    while len(hosts.pids("h2")) < 4:
        pass
    print(hosts.prefix, flush=True)
    if sys.argv[1] == "fail":
        raise AssertionError
    process.wait()
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", ["fail", "SIGTERM", "SIGKILL", "keeper"])
def test_nothing_is_left(hosts: Hosts, how: str) -> None:
    """No process, namespace, bridge or file after a program with hosts fails or is killed; not even if their keeper is."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        prefix = program.stdout.readline().strip()
        assert prefix and [name for name in namespaces() if name.startswith(prefix)]
        running = [pid for host in ("h1", "h2") for pid in pids(f"{prefix}{host}")]
        assert running
        if how.startswith("SIG"):
            program.send_signal(signal.Signals[how])
        elif how == "keeper":
            os.kill(int(prefix.split("-")[-2]), signal.SIGKILL)
            time.sleep(0.5)
            Hosts(1).close()  # the next to make hosts clears up
            program.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        left = [name for name in namespaces() if name.startswith(prefix)]
        alive = [pid for pid in running if Path(f"/proc/{pid}").exists()]
        files = [*ETC.glob(f"{prefix}*"), *Path("/tmp").glob(f"{prefix}*")]
        if not (left or alive or files):
            break
        time.sleep(0.1)
    assert not (left or alive or files), (left, alive, files)
    assert hosts.pids("h2")  # those of others stay
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert "br0" not in links
