"""Horovod in a process that is forked from a rank, as a data loader's workers are."""

import atexit
import ctypes

import torch

from hvd_syncbn import horovod
from tests.parallel.shared.forks import complaints, in_a_fork

hvd = horovod.load("torch")


def _exit_normally() -> None:
    """End as a program does: with handlers of Python and C, where multiprocessing's workers leave them out."""
    atexit._run_exitfuncs()
    ctypes.CDLL(None).exit(0)


def _child() -> dict[str, object]:
    ones = torch.ones(4)
    calls = {
        "allreduce": lambda: hvd.allreduce(ones, name="forked"),
        "grouped_allreduce": lambda: hvd.grouped_allreduce([ones, ones], name="forked_group"),
        "allgather": lambda: hvd.allgather(ones, name="forked"),
        "broadcast": lambda: hvd.broadcast(ones, 0, name="forked"),
        "alltoall": lambda: hvd.alltoall(ones, name="forked"),
        "reducescatter": lambda: hvd.reducescatter(ones, name="forked"),
        "barrier": hvd.barrier,
        "join": hvd.join,
        "allreduce_async": lambda: hvd.allreduce_async(ones, name="forked_async"),
        "init": hvd.init,
        "shutdown": hvd.shutdown,
    }
    return {"errors": complaints(calls), "initialized": hvd.is_initialized(), "rank": hvd.rank(), "size": hvd.size()}


def check_errors_in_a_fork() -> dict[str, object]:
    return in_a_fork(_child, _exit_normally)


def check_the_job_goes_on_after_a_fork_ended() -> list[float]:
    """The fork had the same sockets and the same epoll instance."""
    for _ in range(3):
        in_a_fork(lambda: None, _exit_normally)
    for _ in range(20):
        total = hvd.allreduce(torch.ones(100_000), name="after", op=hvd.Sum)
    return [total.min().item(), total.max().item()]
