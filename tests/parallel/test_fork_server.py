"""The server that forks ranks: a forked rank is like a process of its own, and no process is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.needs import need
from tests.parallel import fork_server
from tests.parallel.job import ROOT, rank_environment

LIMIT = 60.0
pytestmark = pytest.mark.timeout(180)


def start(ending: str, folder: Path = ROOT, **environment: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """The client of a process that ends by a statement, and what the process says of itself."""
    need("torch", "horovod.torch")
    command = [*fork_server.command("torch", rank_environment()), "tests.parallel.checks.rank_facts", ending]
    client = subprocess.Popen(command, cwd=folder, env=rank_environment() | environment, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    return client, json.loads(client.stdout.readline())


def has_ended(pid: int) -> bool:
    deadline = time.monotonic() + LIMIT
    # The first process of a container may leave zombies.
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_rank_is_what_its_client_is(tmp_path: Path) -> None:
    client, facts = start("print('to its output')", tmp_path, RANK_FACTS="a value")
    assert client.stdout is not None and client.stdout.read() == "to its output\n"
    assert client.wait(LIMIT) == 0
    assert facts["pid"] != client.pid and facts["threads"] == 1 and facts["imported"]
    assert (facts["folder"], facts["variable"]) == (str(tmp_path), "a value")
    assert facts["arguments"] == ["print('to its output')"]


def test_ranks_differ_in_the_order_of_sets() -> None:
    hashes = []
    for rank in ("0", "1"):
        client, facts = start("pass", HOROVOD_RANK=rank)
        client.communicate(timeout=LIMIT)
        hashes.append(facts["hash"])
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    ("ending", "status"),
    [("sys.exit(3)", 3), ("os._exit(4)", 4), ("raise ValueError", 1)]
    + [(f"os.kill(os.getpid(), {number:d})", -number) for number in (signal.SIGKILL, signal.SIGTERM)],
)
def test_a_client_ends_as_its_rank(ending: str, status: int) -> None:
    client, _ = start(ending)
    client.communicate(timeout=LIMIT)
    assert client.returncode == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rank_ends_with_its_client(number: signal.Signals) -> None:
    """And so does what the rank has started."""
    below = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    client, facts = start(f"{below}; threading.Event().wait()")
    assert client.stdout is not None
    below_pid = int(client.stdout.readline())
    client.send_signal(number)
    assert client.stdout.read() == ""  # until no process can write to its output
    assert client.wait(LIMIT) == -number
    assert has_ended(facts["pid"]) and has_ended(below_pid)


PROGRAM = """
import os, subprocess, sys
from tests.parallel import fork_server
from tests.parallel.job import rank_environment
command = [*fork_server.command("torch", rank_environment()), "tests.parallel.checks.rank_facts", "threading.Event().wait()"]
client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
client.stdout.readline()
print(os.path.dirname(command[-3]), *(server.pid for server in fork_server._servers), client.pid, flush=True)
sys.stdin.read()
"""


def test_servers_end_with_their_owner() -> None:
    """Even if it is killed; their ranks, and the clients of these, end as well, and no file is left."""
    need("torch", "horovod.torch")
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        folder, *pids = program.stdout.readline().split()
        assert len(pids) == 3 and os.path.exists(folder)
        program.kill()
    assert all(has_ended(int(pid)) for pid in pids)
    assert not os.path.exists(folder)
