"""Runs ``rank.py`` as one process or under ``horovodrun``, and brings back what its rank 0 reports.

The rules of the room:

* What comes back travels on standard output, marked line by line, because ranks on other hosts share no files with us.
* A job ends: at its time limit here, and by an alarm in every rank, which also reaches the ranks of a host that we have lost.
* A job that fails says what failed in one sentence: which host or rank, and its own words.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MARK = "@hvd-syncbn "
TIME_LIMIT = 300
_GRACE_S = 12  # horovodrun gives its ranks 5 s twice

Report = dict[str, Any]


class JobError(Exception):
    """A job did not finish; the message says why."""


class Host(NamedTuple):
    """A host of ``horovodrun -H``, and how many ranks run there."""

    name: str
    slots: int


def parse_hosts(text: str) -> list[Host]:
    """``h1:2,h2:2`` as ``horovodrun -H`` takes it.

    Raises:
        ValueError: it is not that.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([\w.-]+):([1-9]\d*)", part.strip())
        if match is None:
            raise ValueError(f"expected hosts as in h1:2,h2:2 (name and ranks). Received: {text!r}")
        found.append(Host(match[1], int(match[2])))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what a command that runs on a cluster takes; ``hosts_of`` reads it."""
    parser.add_argument("-np", "--num-proc", type=int, metavar="N", dest="ranks", help="ranks, started by horovodrun")
    parser.add_argument("-H", "--hosts", metavar="HOSTS", help="where, as horovodrun takes it: h1:2,h2:2; default: here")
    parser.add_argument(
        "--time-limit",
        type=int,
        default=TIME_LIMIT,
        metavar="S",
        help="seconds for each job (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    parser.set_defaults(usage_error=parser.error)


def hosts_of(args: argparse.Namespace) -> list[Host] | None:
    """Where the parsed options want the ranks; None where they want none. Wrong ones end the program as argparse does."""
    if args.ranks is None:
        if args.hosts is not None:
            args.usage_error("-H needs -np")
        return None
    if args.ranks < 1:
        args.usage_error(f"-np expects 1 rank or more. Received: {args.ranks}")
    try:
        return place(args.ranks, None if args.hosts is None else parse_hosts(args.hosts))
    except ValueError as error:
        args.usage_error(str(error))
        raise


def place(ranks: int, hosts: list[Host] | None) -> list[Host]:
    """The hosts with as many slots as ranks in all, filled in order: horovodrun starts a process for every slot.

    Raises:
        ValueError: there are fewer slots than ranks.
    """
    if hosts is None:
        return [Host("localhost", ranks)]
    if sum(host.slots for host in hosts) < ranks:
        named = ",".join(f"{host.name}:{host.slots}" for host in hosts)
        raise ValueError(f"expected slots for {ranks} ranks. Received: -H {named}")
    left, found = ranks, []
    for host in hosts:
        slots = min(host.slots, left)
        left -= slots
        if slots:
            found.append(Host(host.name, slots))
    return found


def host_of(rank: int, hosts: list[Host]) -> str:
    """The host that horovodrun starts a rank on."""
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
    """Runs a task of ``rank.py`` on the hosts' slots, or without horovodrun where ``hosts`` is None.

    Args:
        task: a name in ``rank.TASKS``.
        framework: ``"torch"`` or ``"tensorflow"``.
        hosts: what ``place`` returns.
        limit: seconds, after which the job is ended.
        launcher: ``"horovodrun"``, or ``"torchrun"`` for ranks on this host.
        report: called with each of rank 0's reports as it comes.
        environment: for all ranks, besides ours.

    Returns:
        The reports.

    Raises:
        JobError: horovodrun, a host or a rank failed, or the time is up. Nothing of the job is left running.
    """
    command = [sys.executable, "-m", "hvd_syncbn.cli.rank", task, framework, str(int(limit))]
    if hosts is not None and launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(hosts[0].slots)]
        command = [sys.executable, *torchrun, *command[1:]]
    elif hosts is not None:
        slots = ",".join(f"{host.name}:{host.slots}" for host in hosts)
        command = [horovodrun(), "-np", str(sum(host.slots for host in hosts)), "-H", slots, *command]
    # Safe path: ranks import the package that this process imports, not one in the current folder.
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONSAFEPATH": "1", **(environment or {})}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    # In a session of its own, so that Ctrl-C reaches us alone and we end the job in order.
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
        raise JobError(f"ended after {limit:.0f} s, the time limit{_last_words(said, hosts)}") from None
    finally:
        end(process, _GRACE_S)
        reader.join(5)
    if process.returncode:
        raise JobError(explain(said, hosts) or f"ended with exit status {process.returncode}")
    if not reports or not reports[-1].get("done"):
        raise JobError("ended without its last report")
    return reports[:-1]


def _report(line: str) -> Report | None:
    """The report in a line of output, which launchers put their labels before, and Open MPI's behind, too."""
    _, mark, data = line.partition(MARK)
    found: Report | None = json.JSONDecoder().raw_decode(data.lstrip())[0] if mark else None
    return found


def horovodrun() -> str:
    """The launcher of this Python's Horovod.

    Raises:
        JobError: there is none.
    """
    beside = Path(sys.executable).parent / "horovodrun"
    found = str(beside) if beside.exists() else shutil.which("horovodrun")
    if found is None:
        raise JobError("horovodrun is not installed. Run `hvd-syncbn build-horovod`")
    return found


def end(process: subprocess.Popen[Any], grace: float = 0) -> None:
    """Ends a process and everything below it, by process id: horovodrun's ranks are in sessions of their own.

    Args:
        process: the launcher.
        grace: seconds that it has to end its ranks itself, on other hosts, too, before what is left is killed.
    """
    try:
        import psutil  # Horovod's requirement, not ours
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


_RANK = re.compile(r"^\[(?:\d+,)?(\d+)\]<std\w+>:\s*")  # Gloo's prefix, and Open MPI's


def explain(said: list[str], hosts: list[Host] | None) -> str | None:
    """What failed first, in one sentence, from everything that a job printed.

    The order is that of causes: what horovodrun could not reach, then a rank's own error, then whatever came last.
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
    # A peer that left is what the other ranks say, and horovodrun repeats that a process failed.
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


def _last_words(said: list[str], hosts: list[Host] | None) -> str:
    words = explain(said, hosts)
    return f"; it said last: {words}" if words else ""
