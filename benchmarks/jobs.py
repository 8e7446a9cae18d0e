"""Starts the processes of a job, alone or under `horovodrun`, and collects their measurements."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Record, Times, slowest
from hvd_syncbn.cli.job import end

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 0.2

Case = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Cases that one set of processes measures one after the other."""

    title: str
    framework: str
    cases: list[Case]
    ranks: int = 1
    threads: int = 1
    pin: bool = False
    """Whether each rank is pinned to one core (a single process: to as many as it has threads)."""
    strategy: bool = False
    """Whether the ranks also create TensorFlow's MultiWorkerMirroredStrategy."""
    environment: dict[str, str] = field(default_factory=dict)
    sets: bool = False
    """Whether each of four ranks is also in two of four process sets of two ranks."""
    hosts: int = 1
    """Hosts, made of network namespaces, with equally many ranks each."""
    controller: str = "gloo"
    """Horovod's controller: "gloo" or "mpi"."""
    limit: float = 300


@dataclass(frozen=True)
class Outcome:
    """The records of all ranks for each finished case of a job, and the error if the job did not finish."""

    job: Job
    records: list[list[Record]]
    error: str | None
    seconds: float

    def of(self, kind: str) -> Iterator[tuple[Case, Times, dict[str, str], list[Record]]]:
        """Yield for every case of a kind the case, the times of its slowest rank, the errors, and all ranks' records."""
        for ranks in self.records:
            if ranks[0]["case"]["kind"] == kind:
                errors = {name: text for record in ranks for name, text in record["errors"].items()}
                yield ranks[0]["case"], slowest([record.get("times", {}) for record in ranks]), errors, ranks


def run(job: Job, advance: Callable[[int], None]) -> Outcome:
    """Run a job, end it at its time limit, and call `advance` with the number of newly finished cases."""
    with tempfile.TemporaryDirectory(prefix="hvd-syncbn-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(asdict(job) | {"ports": free_ports(job.ranks * job.strategy)}))
        try:
            command = _command(job, name, stack)
        except RuntimeError as missing:  # this machine cannot have several hosts
            advance(len(job.cases))
            return Outcome(job, [], str(missing), 0.0)
        environment = os.environ | {
            "OMP_NUM_THREADS": str(job.threads),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        with open(folder / "output", "w+") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment | job.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            start, seen = time.monotonic(), 0
            try:
                while process.poll() is None and time.monotonic() < start + job.limit:
                    time.sleep(POLL_SECONDS)
                    done = len(_lines(folder / "0.jsonl"))
                    advance(done - seen)
                    seen = done
                timed_out = process.poll() is None
            finally:
                end(process)
            output.seek(0)
            error = None
            if timed_out:
                error = f"ended after {job.limit:.0f} s"
            elif process.returncode != 0:
                error = _first_error(output.read()) or f"exit status {process.returncode}"
        ranks = [[json.loads(line) for line in _lines(folder / f"{rank}.jsonl")] for rank in range(job.ranks)]
        records = [list(together) for together in zip(*ranks, strict=False)]
        advance(len(job.cases) - seen)
        if error is None and len(records) < len(job.cases):
            error = f"{len(job.cases) - len(records)} cases are missing"
        return Outcome(job, records, error, time.monotonic() - start)


def _command(job: Job, folder: str, stack: contextlib.ExitStack) -> list[str]:
    """Return the command that starts a job; `stack` takes its hosts down.

    Raises:
        RuntimeError: this machine cannot have several hosts.
    """
    command = [sys.executable, "-m", "benchmarks.worker", folder]
    if job.ranks == 1:
        return command
    launcher = [str(Path(sys.executable).parent / "horovodrun"), f"--{job.controller}", "-np", str(job.ranks)]
    # As many slots as ranks, because horovodrun starts one process per slot.
    if job.hosts == 1:
        return [*launcher, "-H", f"localhost:{job.ranks}", *command]
    from tests.cluster.hosts import Hosts

    hosts = stack.enter_context(Hosts(job.hosts))
    slots = ",".join(f"{host}:{job.ranks // job.hosts}" for host in hosts.names)
    return hosts.command(hosts.names[0], [*launcher, "-H", slots, *command])


def first_address() -> str:
    """Return the address of rank 0's host for the other ranks: horovodrun starts rank 0 where it runs itself."""
    return os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")


def free_ports(count: int) -> list[int]:
    """Return ports that are free now; TensorFlow's strategy needs them before any rank starts."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _lines(path: Path) -> list[str]:
    """Return the complete lines of a file; an empty list if it does not exist yet."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _first_error(output: str) -> str | None:
    """Return the first error of a rank, which comes before horovodrun's message that a process failed."""
    lines = re.findall(r"^(?:\[\d+\]<stderr>:)?(\w+(?:\.\w+)*(?:Error|Exception): .*)", output, re.MULTILINE)
    return lines[0][:300] if lines else None
