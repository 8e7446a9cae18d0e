"""Run functions in a process forked from a rank, such as a data loader's worker."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

LIMIT = 30.0


def in_a_fork(function: Callable[[], Any], leave: Callable[[], None], seconds: float = 60) -> Any:
    """Return what `function` returns in a forked process, as JSON.

    Args:
        function: Called in the child.
        leave: Ends the child.
        seconds: After this the child is killed.

    Raises:
        TimeoutError: The child did not end.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            os.write(write, json.dumps(function()).encode())
            leave()
        finally:
            os._exit(1)
    os.close(write)
    deadline = time.monotonic() + seconds
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            text = os.read(read, 1 << 16).decode()
            raise TimeoutError(f"The forked process did not end within {seconds} s. It returned: {text or 'nothing'}")
        time.sleep(0.02)
    with open(read) as file:
        return json.load(file)


def complaints(calls: dict[str, Callable[[], object]]) -> dict[str, str]:
    """Return what each call raises: the type and the message; "nothing" where it does not raise."""
    found = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "nothing"
    return found


def in_fork(run: Callable[[], Any]) -> str:
    """Run a function in a forked process: its ``str(result)``, or the error's class and text; "it waits" after LIMIT."""

    def told() -> str:
        try:
            return str(run())
        except BaseException as error:
            return f"{type(error).__name__}: {error}"

    try:
        return str(in_a_fork(told, lambda: os._exit(0), LIMIT))
    except TimeoutError:
        return "it waits"


def assert_refused(run: Callable[[], Any]) -> None:
    told = in_fork(run)
    assert told.startswith("RuntimeError: ") and "forked after `hvd.init()`" in told and ".eval()" in told, told
