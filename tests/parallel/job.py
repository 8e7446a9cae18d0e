"""Runs a group of checks under one `horovodrun`, and hands each check's outcome to pytest.

A group is a module `tests/parallel/checks/<group>.py` of functions `check_*()`. All ranks run all of them in the order of the
file, with Horovod initialised. A check raises, or returns something JSON can hold. A rank in which a check raises ends there:
its peers would wait for it in the next collective; they end with an error, and the remaining checks count as failed.

Ranks are forked from a process that has imported their framework: see fork_server.py. As a program
(`python -m tests.parallel.job GROUP FOLDER`) this module is one rank without that.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hvd_syncbn import horovod
from hvd_syncbn.cli.job import end
from tests.needs import need
from tests.parallel import fork_server

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"torch": "torch", "tensorflow": "tensorflow", "keras": "tensorflow"}


def checks(group: str) -> list[str]:
    """The names of a group's checks, read without importing a framework."""
    text = (Path(__file__).parent / "checks" / f"{group}.py").read_text()
    return re.findall(r"^def (check_\w+)", text, re.MULTILINE)


@dataclass
class Job:
    """What a finished job left: per rank, check -> {"value": ...} or {"error": traceback}; and all that was printed."""

    ranks: list[dict[str, dict[str, Any]]]
    output: str

    def values(self, check: str) -> list[Any]:
        """What every rank returned from a check; fails the test if one did not get that far."""
        for rank, outcomes in enumerate(self.ranks):
            outcome = outcomes.get(check)
            if outcome is None:
                errors = [f"rank {r}: {o['error']}" for r, all_ in enumerate(self.ranks) for o in all_.values() if "error" in o]
                raise AssertionError(f"rank {rank} never finished {check}.\n" + "\n".join(errors or [self.output[-8000:]]))
            if "error" in outcome:
                raise AssertionError(f"rank {rank}:\n{outcome['error']}")
        return [outcomes[check]["value"] for outcomes in self.ranks]


def rank_environment() -> dict[str, str]:
    """Ours, for ranks that share a small machine."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "2",
        # Ranks that wait for each other every 0.1 ms use half of what two cores have.
        "HOROVOD_CYCLE_TIME": "2",
        # A peer that died is noticed at once; this is how long a busy machine may keep one from its turn (default: 30).
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "120",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@cache
def run(group: str, ranks: int, timeout: float = 240, **environment: str) -> Job:
    """Runs a group once per session and rank count; `ranks=1` runs without horovodrun, as a user would."""
    framework = FRAMEWORKS[group.split("_")[0]]
    need(framework, f"horovod.{framework}")
    with tempfile.TemporaryDirectory() as folder:
        # TensorFlow reads variables of its own when it is imported.
        forked = not any(name.startswith("TF_") for name in environment)
        rank = fork_server.command(framework, rank_environment()) if forked else [sys.executable, "-m"]
        command = [*rank, "tests.parallel.job", group, folder]
        if ranks > 1:
            horovodrun = Path(sys.executable).parent / "horovodrun"
            # As many slots as ranks: horovodrun starts one process per slot.
            command = [str(horovodrun), "--gloo", "-np", str(ranks), "-H", f"localhost:{ranks}", *command]
        process = subprocess.Popen(
            command, cwd=ROOT, env=rank_environment() | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            end(process)
            output = process.communicate()[0] + f"\n(ended after {timeout} s)"
        except BaseException:
            end(process)
            raise
        return Job(outcomes_in(folder, ranks), output)


def outcomes_in(folder: str, ranks: int) -> list[dict[str, dict[str, Any]]]:
    """Read what the ranks of a job have written to its folder."""
    outcomes = []
    for rank in range(ranks):
        path = Path(folder) / f"{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        outcomes.append({entry.pop("check"): entry for entry in map(json.loads, lines)})
    return outcomes


def run_checks(group: str, folder: str, rank: int) -> None:
    """Run a group's checks in this rank and write their outcomes to the folder. The process ends if one raises."""
    module = importlib.import_module(f"tests.parallel.checks.{group}")
    with open(Path(folder) / f"{rank}.jsonl", "w") as log:
        for check in checks(group):
            try:
                entry = {"check": check, "value": getattr(module, check)()}
            except BaseException:
                entry = {"check": check, "error": traceback.format_exc()}
            log.write(json.dumps(entry) + "\n")
            log.flush()
            if "error" in entry:
                os._exit(1)


def main() -> None:
    """One rank."""
    group, folder = sys.argv[1:]
    framework = FRAMEWORKS[group.split("_")[0]]
    hvd = horovod.load(framework)
    hvd.init()
    if framework == "torch":
        import torch

        torch.set_num_threads(1)
    run_checks(group, folder, hvd.rank())
    if hvd.is_initialized():
        # The first rank to end ends Horovod for all, and a group of ranks may still be at the last check. Where a rank has died
        # there is nobody to wait for, and to end with an error would have horovodrun end the others in their check.
        with contextlib.suppress(Exception):
            hvd.allgather_object(None, name="checks are done")
    hvd.shutdown()


if __name__ == "__main__":
    main()
