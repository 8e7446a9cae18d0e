"""Horovod in a process that is forked from a rank."""

import os

import tensorflow as tf

from hvd_syncbn import horovod
from tests.parallel.shared.forks import complaints, in_a_fork

hvd = horovod.load("tensorflow")


def _child() -> dict[str, object]:
    ones = tf.ones(4)
    calls = {
        "allreduce": lambda: hvd.allreduce(ones, name="forked"),
        "grouped_allreduce": lambda: hvd.grouped_allreduce([ones, ones]),
        "allgather": lambda: hvd.allgather(ones, name="forked"),
        "broadcast": lambda: hvd.broadcast(ones, 0, name="forked"),
        "init": hvd.init,
        "shutdown": hvd.shutdown,
    }
    return {"errors": complaints(calls), "initialized": hvd.is_initialized(), "rank": hvd.rank(), "size": hvd.size()}


def check_errors_in_a_fork() -> dict[str, object]:
    # TensorFlow's own threads are not in a fork either, so it ends without their destructors.
    return in_a_fork(_child, lambda: os._exit(0))


def check_the_job_goes_on_after_a_fork_ended() -> list[float]:
    for _ in range(20):
        total = hvd.allreduce(tf.ones(100_000), name="after", op=hvd.Sum)
    return [float(tf.reduce_min(total)), float(tf.reduce_max(total))]
