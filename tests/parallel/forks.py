"""What a forked process comes to, as a data loader's worker is one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

LIMIT = 30.0


def in_fork(run: Callable[[], Any]) -> str:
    """Run a function in a forked process: its ``str(result)``, or the error's class and text; "it waits" after LIMIT."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            told = str(run())
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(write, told.encode()[:60000])
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            with os.fdopen(read) as pipe:
                return pipe.read()
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)
    return "it waits"


def assert_refused(run: Callable[[], Any]) -> None:
    told = in_fork(run)
    assert told.startswith("RuntimeError: ") and "forked after `hvd.init()`" in told and ".eval()" in told, told
