"""Runs a stage's programs: each with a time limit and in a process group of its own, its output in a file as it comes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"  # the package of this checkout, with its native libraries
HOROVOD = BUILD / "horovod"  # in a folder of its own: the tests of the kernels do not need it

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
OVER_TIME, NOT_STARTED = -1000, -1001
"""What `Stage.run` returns for a program that was ended at its limit, or that is missing; no exit status is so."""

_GRACE_S = 3.0


class Result(NamedTuple):
    """The outcome of a stage, and a sentence about it."""

    status: str
    what: str


class Background(NamedTuple):
    """A program that goes on while stages run."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, seconds: float) -> int:
        """Wait, end the program, and return the exit status or OVER_TIME."""
        try:
            return self.process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return OVER_TIME
        finally:
            end(self.process)


class Stage:
    """What a stage runs its programs with.

    Args:
        logs: the folder for their output.
        carried: what `--prepare` made, or None.
        seconds: until the stage has to be over.
    """

    def __init__(self, logs: Path, carried: Path | None, seconds: float) -> None:
        self.logs = logs
        self.carried = carried
        self._deadline = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds until the stage has to be over."""
        return max(self._deadline - time.monotonic(), 0.0)

    def run(
        self,
        log: str,
        *command: str,
        limit: float | None = None,
        path: Iterable[Path] = (),
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Run a program to its end or its limit; the exit status, OVER_TIME or NOT_STARTED.

        Args:
            log: the name of the file for its output.
            command: the program; one that starts with "-" is an option of this Python.
            limit: seconds; what is left of the stage at most.
            path: folders of Python packages besides the built one.
            environment: variables besides ours.
        """
        try:
            background = self.start(log, *command, path=path, environment=environment)
        except OSError as error:
            with (self.logs / log).open("a") as out:
                out.write(f"{command[0]} could not be started: {error}\n")
            return NOT_STARTED
        return background.wait(min(self.left(), self.left() if limit is None else limit))

    def start(
        self, log: str, *command: str, path: Iterable[Path] = (), environment: Mapping[str, str] | None = None
    ) -> Background:
        """Start a program that is waited for later."""
        if command[0].startswith("-"):
            command = (sys.executable, *command)
        file = self.logs / log
        with file.open("ab") as out:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **python_environment(path), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _running.append(process)
        return Background(process, file)


_running: list[subprocess.Popen[bytes]] = []


def end_all() -> None:
    """End every program that is still running."""
    for process in _running:
        end(process)


def python_environment(path: Iterable[Path]) -> dict[str, str]:
    """Return variables by which Python finds the built package, then this checkout's tests and benchmarks."""
    # Safe path: `hvd_syncbn` is the built package, not the checkout's.
    before = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    folders = [*before, *map(str, path), str(SITE), str(ROOT)]
    programs = [str(folder / "bin") for folder in path]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(folders)),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join([*programs, os.environ.get("PATH", ""), str(Path(sys.executable).parent)]),
    }


def end(process: subprocess.Popen[Any]) -> None:
    """End a program's process group and its descendants in other groups, as horovodrun's ranks are; asking first."""
    if process.poll() is not None and not _group_exists(process.pid):
        return
    family = [*_descendants(process.pid), process.pid]
    for request in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, request)
        for member in family:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member, request)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except OSError:
        return False
    return True


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        queue += (below := children.get(queue.pop(), []))
        found += below
    return found


def last_lines(log: Path, lines: int = 25) -> str:
    """Return the end of a log."""
    if not log.exists():
        return ""
    return "\n".join(line[:200] for line in log.read_text(errors="replace").splitlines()[-lines:])
