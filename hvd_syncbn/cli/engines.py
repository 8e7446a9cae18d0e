"""What the ranks of a job of ``job.py`` talk through: Horovod, or another engine by the names of Horovod's functions."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import socket
from typing import Any

from hvd_syncbn import horovod

_PR_SET_PDEATHSIG = 1


def find(framework: str, launcher: str, ranks: int) -> Any:
    """Return the engine of a job, not yet initialized; a process without a launcher needs no Horovod.

    Args:
        framework: ``"torch"`` or ``"tensorflow"``.
        launcher: a name in ``job.LAUNCHERS``, or ``""``.
        ranks: of the job.
    """
    if launcher in ("mirrored", "multiworker"):
        return Strategy(launcher, ranks)
    if launcher == "torchrun":
        return Distributed()
    if not launcher and importlib.util.find_spec("horovod") is None:
        return Distributed() if framework == "torch" else Strategy("mirrored", 1)
    return horovod.load(framework)


class Distributed:
    """torch.distributed over Gloo, under torchrun or for one process."""

    def init(self) -> None:
        """Initialize the default process group."""
        import torch.distributed as dist

        if "TORCHELASTIC_RUN_ID" in os.environ:
            dist.init_process_group("gloo")
        else:
            dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        self.rank, self.size, self.shutdown = dist.get_rank, dist.get_world_size, dist.destroy_process_group
        self.add_process_set, self.global_process_set = dist.new_group, dist.group.WORLD

    def local_rank(self) -> int:
        """Return this rank's number on its host."""
        return int(os.environ["LOCAL_RANK"])

    def allgather_object(self, value: Any, name: str) -> list[Any]:
        """Return the values of all ranks."""
        import torch.distributed as dist

        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, value)
        return everyone

    def remove_process_set(self, process_set: Any) -> None:
        """Destroy a group if this rank is a member."""
        import torch.distributed as dist

        if process_set is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(process_set)

    def nccl_built(self) -> bool:
        """Return whether packets of GPUs go through NCCL, which rejects ranks that share one."""
        return False


class Strategy:
    """The CPU replicas of a tf.distribute strategy: of this process, or one in each of several workers on this host."""

    def __init__(self, launcher: str, replicas: int) -> None:
        """Become one of the workers, in a fork without TensorFlow's threads; the first process is worker 0."""
        self._replicas = replicas
        self._index, self._children = 0, list[int]()
        if launcher != "multiworker":
            return
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(replicas)]
            addresses = [f"localhost:{each.getsockname()[1]}" for each in sockets]
        for index in range(1, replicas):
            child = os.fork()
            if child == 0:
                self._index, self._children = index, []
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it does not outlive worker 0
                break
            self._children.append(child)
        task = {"type": "worker", "index": self._index}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})

    def init(self) -> None:
        """Create the strategy and enter its scope."""
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        if "TF_CONFIG" in os.environ:
            self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        else:
            cpu = tf.config.list_physical_devices("CPU")[0]
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * self._replicas)
            self.strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(self._replicas)])
        self._scope = self.strategy.scope()
        self._scope.__enter__()

    def rank(self) -> int:
        """Return the number of this worker."""
        return self._index

    def size(self) -> int:
        """Return the number of replicas of all workers."""
        return self._replicas

    def shutdown(self) -> None:
        """Wait for the other workers, whose collectives need this one."""
        self._scope.__exit__(None, None, None)
        for child in self._children:
            _, status = os.waitpid(child, 0)
            if status:
                raise RuntimeError(f"a worker of tf.distribute ended with exit status {os.waitstatus_to_exitcode(status)}")
