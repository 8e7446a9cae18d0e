"""Runs an elastic job in which workers die, hosts come and go, and says who was back when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.jobs import end
from tests.cluster.hosts import Hosts

ROOT = Path(__file__).parents[2]
MODULES = {"PyTorch": "tests.cluster.elastic_torch", "Keras": "tests.cluster.elastic_keras"}


@dataclass
class Job:
    """What a finished job left: its status, all that was printed, all workers' log lines by time, and rank 0's result."""

    module: str
    status: int | None
    output: str
    log: list[dict[str, Any]]
    result: dict[str, Any] | None

    def of(self, event: str) -> list[dict[str, Any]]:
        """The log lines of an event."""
        return [line for line in self.log if line["event"] == event]

    def batches(self) -> list[list[int]]:
        """The global batches that the statistics are made of, in their order: the samples of all workers."""
        assert self.result is not None, self.output[-8000:]
        batches: dict[str, list[int]] = {}
        for line in self.of("batch"):
            batches.setdefault(line["key"], []).extend(line["samples"])
        return [batches[key] for key in self.result["history"]]

    def group_batches(self) -> list[list[int]]:
        """The same, of rank 0's group at that time."""
        assert self.result is not None, self.output[-8000:]
        samples = {(line["key"], line["rank"]): line["samples"] for line in self.of("batch")}
        groups = zip(self.result["history"], self.result["groups"], strict=True)
        return [[sample for rank in ranks for sample in samples[key, rank]] for key, ranks in groups]

    def alone(self) -> list[str]:
        """The statistics of one process that is given these batches: of the worker's module, in a process of its own."""
        given = json.dumps({"batches": self.batches(), "grouped": self.group_batches()})
        command = [sys.executable, "-m", self.module]
        done = subprocess.run(command, input=given, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        found: list[str] = json.loads(done.stdout)
        return found

    def recoveries(self) -> list[dict[str, float]]:
        """For each death: worker -> seconds until it was back in the loop, of all that lived on (infinity: never)."""
        loops, deaths = self.of("loop"), self.of("dies")
        died, removed = {line["pid"] for line in deaths}, self._removed()
        found = []
        for death in deaths:
            alive = {line["pid"]: line["worker"] for line in loops if line["time"] < death["time"]}
            back = {}
            for pid, worker in alive.items():
                after = [line["time"] for line in loops if line["pid"] == pid and line["time"] > death["time"]]
                # Not of those that die, too, before they are back.
                if pid not in removed and (after or pid not in died):
                    back[worker] = min(after, default=float("inf")) - death["time"]
            found.append(back)
        return found

    def _removed(self) -> set[int]:
        """Those that the driver let go: they are in no loop after the last one that they are in, and did not die."""
        ended, died = ({line["pid"] for line in self.of(event)} for event in ("end", "dies"))
        return {
            line["pid"]
            for line in self.of("loop")
            if line["pid"] not in ended | died and f"{line['worker'].replace(':', '[')}] has been removed" in self.output
        }


def print_stacks(pids: Sequence[int]) -> None:
    """Have every Python among these processes write, by faulthandler, where its threads are, and end."""
    for pid in pids:
        try:
            if b"python" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
                os.kill(pid, signal.SIGABRT)
        except OSError:
            continue
    time.sleep(3)


def run(
    hosts: Hosts,
    folder: Path,
    slots: Mapping[str, int],
    plan: Sequence[Mapping[str, Any]] = (),
    *,
    framework: str = "PyTorch",
    steps: int = 12,
    during: Callable[[Callable[[Mapping[str, int]], None], Callable[[str], list[dict[str, Any]]]], None] | None = None,
    timeout: float = 240,
    options: Sequence[str] = (),
    **environment: str,
) -> Job:
    """Run an elastic job.

    Args:
        hosts: where.
        folder: an empty one, for all that the job leaves.
        slots: host -> number of workers, at the beginning.
        plan: who dies when: `worker` ("h2:0", "rank 0"), `step` (or -1: when there is a file `now` in the folder), `where`
            ("forward", "backward", "between"), `how` ("kill", "raise").
        framework: one of MODULES.
        steps: of the whole job.
        during: called while the job runs, with a function that changes `slots` and one that tells the log lines of an event,
            and fails if the job has ended.
        timeout: seconds after which the job is ended.
        options: of horovodrun.
        environment: of the workers.
    """
    (folder / "plan.json").write_text(json.dumps(list(plan)))
    listing, script = folder / "hosts", folder / "discover.sh"

    def discover(slots: Mapping[str, int]) -> None:
        # In one stroke: the script may read it at any time.
        (folder / "hosts.new").write_text("".join(f"{host}:{number}\n" for host, number in slots.items()))
        (folder / "hosts.new").replace(listing)

    def lines() -> list[dict[str, Any]]:
        texts = [path.read_text() for path in folder.glob("*.jsonl")]
        return sorted(
            (json.loads(line) for text in texts for line in text.split("\n")[:-1]), key=lambda line: float(line["time"])
        )

    discover(slots)
    script.write_text(f"#!/bin/sh\ncat {listing}\n")
    script.chmod(0o755)
    count = str(sum(slots.values()))
    command = [str(Path(sys.executable).parent / "horovodrun"), "--gloo", "-np", count, "--min-np", "1", "--max-np", "4"]
    command += ["--host-discovery-script", str(script), "--network-interfaces", "eth0", *options]
    command += [sys.executable, "-m", MODULES[framework], str(folder), str(steps)]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONFAULTHANDLER": "1",
        # Recovery must not depend on it.
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "600",
    }
    with (folder / "output").open("w+") as output:
        process = hosts.start("h1", command, cwd=ROOT, env=env | environment, stdout=output, stderr=output)

        def of(event: str) -> list[dict[str, Any]]:
            assert process.poll() is None, (folder / "output").read_text()[-8000:]
            return [line for line in lines() if line["event"] == event]

        try:
            deadline = time.monotonic() + timeout
            if during is not None:
                during(discover, of)
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            status = process.poll()
            if status is None:
                print_stacks([pid for host in hosts.names for pid in hosts.pids(host)])
        finally:
            end(process)
        output.seek(0)
        path = folder / "result.json"
        result = json.loads(path.read_text()) if path.exists() else None
        return Job(MODULES[framework], status, output.read(), lines(), result)
