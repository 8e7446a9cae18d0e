"""Which processes Horovod runs in: not those that were forked after it was initialised."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os, subprocess, sys
import horovod.{framework} as hvd
from hvd_syncbn import horovod
if horovod._forked:
    sys.exit("remembered by a process that was not forked")

def in_fork(run):
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, run

def is_a_rank():
    assert not horovod._forked
    hvd.init()
    horovod.check_not_forked(hvd)
    assert hvd.size() == 1
    hvd.shutdown()

def is_none():
    try:
        horovod.check_not_forked(hvd)
    except RuntimeError as error:
        assert "forked after `hvd.init()`" in str(error) and str(os.getpid()) in str(error)
    else:
        raise AssertionError
"""

MAIN = """
in_fork(is_a_rank)  # as the workers of Ray and Spark
in_fork(lambda: (hvd.init(), in_fork(is_none), horovod.check_not_forked(hvd)))
hvd.init()
in_fork(is_none)
in_fork(lambda: in_fork(is_none))
horovod.check_not_forked(hvd)
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)  # fork and exec
hvd.shutdown()
in_fork(is_a_rank)
"""


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_processes(framework: str) -> None:
    pytest.importorskip(f"horovod.{framework}")
    code = CODE.replace("{framework}", framework)
    env = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    done = subprocess.run(
        [sys.executable, "-c", code + MAIN, code + "is_a_rank()"],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
