"""Runs ``rank.py`` as one process or on the ranks of a launcher, and returns the reports of its rank 0.

Rules:

* Reports are marked lines on standard output, because ranks on other hosts may not share a file system.
* Every job ends: at its time limit here, and by an alarm in each rank, which also ends ranks on hosts that we can no longer
  reach.
* The error of a failed job is one sentence: the host or rank that failed, and its message.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LAUNCHERS = {
    "horovodrun": ("torch", "tensorflow"),
    "torchrun": ("torch",),
    "mirrored": ("tensorflow",),
    "multiworker": ("tensorflow",),
}
"""What starts ranks, and the frameworks that run under it. The last two are replicas of ``tf.distribute.MirroredStrategy`` in
one process, and workers of ``MultiWorkerMirroredStrategy``. All but horovodrun start ranks on this host only."""

MARK = "@hvd-syncbn "
TIME_LIMIT = 300
_GRACE_S = 12  # horovodrun gives its ranks 5 s twice

Report = dict[str, Any]


class JobError(Exception):
    """A job did not finish; the message says why."""


class Host(NamedTuple):
    """A host of ``horovodrun -H`` and its number of slots."""

    name: str
    slots: int


def parse_hosts(text: str) -> list[Host]:
    """Parse ``h1:2,h2:2``, the format of ``horovodrun -H``.

    Raises:
        ValueError: the text has another format.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([\w.-]+):([1-9]\d*)", part.strip())
        if match is None:
            raise ValueError(f"expected hosts in the format h1:2,h2:2 (name:ranks). Received: {text!r}")
        found.append(Host(match[1], int(match[2])))
    return found


def add_arguments(parser: argparse.ArgumentParser, launchers: Sequence[str]) -> None:
    """Declare the options of a command that runs on ranks of one of the launchers; ``hosts_of`` reads them."""
    parser.add_argument("-np", "--num-proc", type=int, metavar="N", dest="ranks", help="number of ranks")
    parser.add_argument("-H", "--hosts", metavar="HOSTS", help="hosts and ranks, such as h1:2,h2:2 (default: this host)")
    parser.add_argument(
        "--launcher",
        choices=launchers,
        default="horovodrun",
        help="what starts the ranks of -np; all but horovodrun start them on this host (default: %(default)s)",
    )
    parser.add_argument(
        "--time-limit",
        type=int,
        default=TIME_LIMIT,
        metavar="S",
        help="time limit of each job in seconds (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.set_defaults(usage_error=parser.error)


def hosts_of(args: argparse.Namespace) -> list[Host] | None:
    """Return the hosts in the parsed options; None without ``-np``. Wrong options exit as argparse does."""
    if args.launcher != "horovodrun" and args.hosts is not None:
        args.usage_error(f"-H needs --launcher horovodrun. Received: --launcher {args.launcher} -H {args.hosts}")
    if args.launcher in LAUNCHERS and args.launcher != "horovodrun" and args.ranks is None:
        args.usage_error(f"--launcher {args.launcher} needs -np, the number of ranks")
    if args.ranks is None:
        if args.hosts is not None:
            args.usage_error(f"-H needs -np, the number of ranks. Received: -H {args.hosts}")
        return None
    if args.ranks < 1:
        args.usage_error(f"expected -np to be at least 1. Received: {args.ranks}")
    try:
        return place(args.ranks, None if args.hosts is None else parse_hosts(args.hosts))
    except ValueError as error:
        args.usage_error(str(error))
        raise


def place(ranks: int, hosts: list[Host] | None) -> list[Host]:
    """Return hosts with one slot per rank, filled in order, because horovodrun starts a process for every slot.

    Raises:
        ValueError: there are fewer slots than ranks.
    """
    if hosts is None:
        return [Host("localhost", ranks)]
    if sum(host.slots for host in hosts) < ranks:
        named = ",".join(f"{host.name}:{host.slots}" for host in hosts)
        raise ValueError(f"expected at least {ranks} slots for {ranks} ranks. Received: -H {named}")
    left, found = ranks, []
    for host in hosts:
        slots = min(host.slots, left)
        left -= slots
        if slots:
            found.append(Host(host.name, slots))
    return found


def host_of(rank: int, hosts: list[Host]) -> str:
    """Return the host that horovodrun starts a rank on."""
    for host in hosts:
        if rank < host.slots:
            return host.name
        rank -= host.slots
    raise ValueError(f"expected one of the job's ranks. Received: {rank} beyond {hosts}")


def run(
    task: str,
    framework: str,
    hosts: list[Host] | None = None,
    *,
    limit: float = TIME_LIMIT,
    launcher: str = "horovodrun",
    report: Callable[[Report], None] = lambda _: None,
    environment: Mapping[str, str] | None = None,
) -> list[Report]:
    """Run a task of ``rank.py`` on the hosts' slots, or in one process if ``hosts`` is None.

    Args:
        task: a name in ``rank.TASKS``.
        framework: ``"torch"`` or ``"tensorflow"``.
        hosts: the result of ``place``.
        limit: time limit in seconds.
        launcher: a name in ``LAUNCHERS``; unused if ``hosts`` is None.
        report: called with each report of rank 0 as it arrives.
        environment: variables for all ranks, in addition to this process's.

    Returns:
        The reports.

    Raises:
        JobError: the launcher, a host or a rank failed, or the time limit was reached. No process of the job is left running.
    """
    ranks = str(sum(host.slots for host in hosts or []))
    launcher = "" if hosts is None else launcher
    command = [sys.executable, "-m", "hvd_syncbn.cli.rank", task, framework, str(int(limit)), launcher, ranks]
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        command = [sys.executable, *torchrun, *command[1:]]
    elif launcher == "horovodrun":
        slots = ",".join(f"{host.name}:{host.slots}" for host in hosts or [])
        command = [horovodrun(), "-np", ranks, "-H", slots, *command]
    # Safe path: ranks import the package that this process imports, not one in the current folder.
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONSAFEPATH": "1", **(environment or {})}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    # In a separate session, so that Ctrl-C reaches only this process, which then ends the job in order.
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    reports: list[Report] = []
    said: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            found = _report(line)
            if found is None:
                said.append(line.rstrip())
            else:
                reports.append(found)
                report(found)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        raise JobError(f"ended after {limit:.0f} s, the time limit{_last_message(said, hosts)}") from None
    finally:
        end(process, _GRACE_S)
        reader.join(5)
    if process.returncode:
        raise JobError(explain(said, hosts) or f"ended with exit status {process.returncode}")
    if not reports or not reports[-1].get("done"):
        raise JobError("ended without the last report of rank 0")
    return reports[:-1]


def _report(line: str) -> Report | None:
    """Return the report in a line of output, or None. Launchers put labels before it, and Open MPI also after it."""
    _, mark, data = line.partition(MARK)
    found: Report | None = json.JSONDecoder().raw_decode(data.lstrip())[0] if mark else None
    return found


def horovodrun() -> str:
    """Return the path of ``horovodrun`` of this Python's Horovod.

    Raises:
        JobError: it is not installed.
    """
    beside = Path(sys.executable).parent / "horovodrun"
    found = str(beside) if beside.exists() else shutil.which("horovodrun")
    if found is None:
        raise JobError("horovodrun is not installed. Run `hvd-syncbn build-horovod`")
    return found


def end(process: subprocess.Popen[Any], grace: float = 0) -> None:
    """End a process and all its descendants by process id, because horovodrun's ranks run in separate sessions.

    Args:
        process: the launcher.
        grace: seconds in which the launcher may end its ranks, also on other hosts, before the remaining ones are killed.
    """
    try:
        import psutil  # a requirement of Horovod, not of this package
    except ModuleNotFoundError:  # torchrun ends its ranks
        process.terminate()
        try:
            process.wait(grace or 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return

    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        family = [*launcher.children(recursive=True), launcher]
        if grace:
            launcher.terminate()
            deadline = time.monotonic() + grace
            while time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.05)
            family = list({*family, *launcher.children(recursive=True)})
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=10)
    process.wait()


_RANK = re.compile(r"^\[(?:\d+,)?(\d+)\]<std\w+>:\s*")  # the prefix of Gloo and of Open MPI


def explain(said: list[str], hosts: list[Host] | None) -> str | None:
    """Return one sentence about the first failure in the output of a job; None if there is no output.

    Candidates in order: a host that horovodrun could not reach, the first error of a rank, the last line.
    """
    for line, following in itertools.pairwise([*said, ""]):
        unreachable = re.match(r"ssh not successful for host (.*):", line)
        if unreachable:
            return f"host {unreachable[1]} cannot be reached by ssh: {following.strip() or 'no answer'}"
        waited = re.search(r"Timed out waiting for .*", line)
        if waited:
            return waited[0]
    errors = []
    for line in said:
        match = re.search(r"\b(?:\w+\.)*(\w+(?:Error|Exception)\b:? .*|No module named .*)", line)
        if match:
            errors.append(f"{_where(line, hosts)}{match[1].rstrip(')')}")
    # These only repeat the first error: other ranks report that a peer left, and horovodrun that a process failed.
    for echo in ("HorovodInternalError", "Horovod detected that one or more processes"):
        errors = [error for error in errors if echo not in error] or errors
    if errors:
        return errors[0][:500]
    last = [line for line in said if line.strip()]
    return f"{_where(last[-1], hosts)}{_RANK.sub('', last[-1])}"[:500] if last else None


def _where(line: str, hosts: list[Host] | None) -> str:
    rank = _RANK.match(line)
    if rank is None or hosts is None:
        return ""
    return f"rank {rank[1]} on {host_of(int(rank[1]), hosts)}: "


def _last_message(said: list[str], hosts: list[Host] | None) -> str:
    message = explain(said, hosts)
    return f"; its last message: {message}" if message else ""
