"""Fork ranks from a process that has imported their framework: the import takes seconds of CPU time, a fork milliseconds.

A job starts `rank_client.py` for each rank. The client passes its arguments, environment, working directory and standard
streams to a server. The server forks a keeper, and the keeper forks the rank. The client ends with the rank's exit status or
signal. If the client is killed, the keeper kills the rank. All test processes of one pytest share the servers; if pytest ends,
the servers, their keepers and their ranks end.

    python -m tests.parallel.fork_server LISTENER FRAMEWORK OWNER
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import numpy

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).with_name("rank_client.py")
# What ranks import. None of it may start a thread: a forked process has only the thread that called fork.
MODULES = {
    "torch": ("torch", "torch._dynamo", "horovod.torch", "hvd_syncbn.torch", "pytest"),
    "tensorflow": ("tensorflow", "keras", "horovod.tensorflow", "hvd_syncbn.keras", "hvd_syncbn.tensorflow", "pytest"),
}
# Objects, and multiples of it. By default the garbage collector takes 5% of a Keras rank's CPU time: a traced function has tens
# of thousands of objects.
GC_THRESHOLD = (20_000, 10, 10)
PR_SET_PDEATHSIG = 1
LONGEST_REQUEST = 1 << 20  # bytes

_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_RUN = os.environ["PYTEST_XDIST_TESTRUNUID"] if _IS_WORKER else uuid.uuid4().hex
# pytest, which is the parent of xdist's workers. A server ends with it.
_OWNER = os.getppid() if _IS_WORKER else os.getpid()
_servers: list[subprocess.Popen[bytes]] = []  # that this process has started


def command(framework: str, environment: dict[str, str]) -> list[str]:
    """Return the beginning of a command that has a forked process run a module; its name and arguments follow.

    Args:
        framework: a key of `MODULES`. The first call of a test run starts its servers.
        environment: of the servers. A rank gets its own, but frameworks read some variables when they are imported.
    """
    # Isolated and without `site`, the client starts in 15 ms.
    return [sys.executable, "-I", "-S", str(CLIENT), _sockets(framework, environment)]


def _sockets(framework: str, environment: dict[str, str]) -> str:
    """Return the path of the sockets of a framework's two servers, without the 0 and 1 that follow; start them if need be.

    The first forks the even ranks and the second the odd ones, so that not all ranks iterate over a set in the same order.
    """
    folder = Path(tempfile.gettempdir(), f"hvd-syncbn-fork-{_RUN}")
    folder.mkdir(mode=0o700, exist_ok=True)
    path = str(folder / framework)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(f"{path}1"):
            for number in (0, 1):
                _start(framework, f"{path}{number}", environment)
    return path


def _start(framework: str, path: str, environment: dict[str, str]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(16)  # clients wait until the server has imported its modules
        number = listener.fileno()
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(number), framework, str(_OWNER)], cwd=ROOT, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[number], start_new_session=True,
        )  # fmt: skip
        _servers.append(server)


def serve(listener: socket.socket, owner: int) -> None:
    """Fork a rank for each client until the owner has ended. Returns in the ranks; ends the process in the server."""
    server = os.getpid()
    path = Path(listener.getsockname())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers need not be waited for
    while True:
        if owner in select.select([owner, listener], [], [])[0]:
            break
        client = listener.accept()[0]
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _end_with(server)
            listener.close()
            os.close(owner)
            _keep(client)
            return
        client.close()
    for leftover in (path, path.with_name(f"{path.name[:-1]}.lock")):
        leftover.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the other servers' sockets may be there
        path.parent.rmdir()
    sys.exit()


def _end_with(parent: int) -> None:
    """Have this process killed when the process that forked it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _keep(client: socket.socket) -> None:
    """Fork a client's rank and tell the client how it ended. Returns in the rank; ends the process in its keeper."""
    request, streams, _, _ = socket.recv_fds(client, LONGEST_REQUEST, 3)
    if not request:
        os._exit(1)
    keeper = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        _end_with(keeper)
        client.close()
        _become(json.loads(request), streams)
        return
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)  # in both processes, as either may run first
    for stream in (0, 1, 2, *streams):
        os.close(stream)  # who reads the rank's output waits until nobody can write any more
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, client], [], [])[0]:
        os.killpg(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        client.send(str(status).encode())
    os._exit(0)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Take over what a client's request says: standard streams, working directory, environment and arguments."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[:] = request["arguments"]
    numpy.random.seed()  # a new process would have other random numbers


def main() -> None:
    """A server, and in each process that it forks a rank."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    owner = os.pidfd_open(int(sys.argv[3]))
    for name in MODULES[sys.argv[2]]:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"expected no import to start a thread. Received: {len(threads)} threads after {MODULES}"
    gc.freeze()  # a collection in a rank would copy the pages of every object
    gc.set_threshold(*GC_THRESHOLD)
    serve(listener, owner)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
