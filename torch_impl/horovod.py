"""Horovod as the engine that sums packets, for PyTorch."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvd_syncbn import horovod
from hvd_syncbn.groups import Groups


class Group(horovod.Group):
    """Ranks that share a batch: a process set of Horovod."""

    def __init__(self, process_set: Any) -> None:
        super().__init__("torch", process_set)

    def sum(self, packet: Tensor, name: str) -> None:
        """Sum a packet over the ranks, in place."""
        self.start_sum(packet, name)()

    def start_sum(self, packet: Tensor, name: str) -> Callable[[], None]:
        """Start a sum over the ranks, in place, and return the function that waits for it."""
        if self.current_size() == 1:
            return lambda: None
        if packet.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph cannot hold the collective {name!r}: a replay would not ask the other ranks. Capture no layer "
                "that synchronizes over several ranks; torch.compile leaves it out of its graphs from PyTorch 2.8 on."
            )
        horovod.warn_if_sizes_differ(name, self.number, packet.numel())
        hvd = self.hvd
        # A Horovod without NCCL takes GPU tensors through host memory, and one without CUDA does not wait for the copy.
        own = packet.cpu() if packet.is_cuda and not hvd.nccl_built() else packet
        handle = hvd.allreduce_async_(own, name=name, op=hvd.Sum, process_set=self.process_set)

        def wait() -> None:
            try:
                hvd.synchronize(handle)
            except hvd.mpi_ops.HorovodInternalError as error:
                detail = horovod.mismatch(error)
                if detail is None:
                    raise
                raise ValueError(horovod.disagreement(name, detail)) from error
            if own is not packet:
                packet.copy_(own)

        return wait

    def gather(self, value: object, name: str) -> list[Any]:
        """Return the values of all ranks of the group."""
        if self.size == 1:
            return [value]
        # Horovod's allgather_object has no process_set argument in PyTorch.
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        options = {"process_set": self.process_set}
        sizes = self.hvd.allgather(torch.tensor([len(data)]), name=f"hvd_syncbn.{name}.sizes", **options)
        everyone = self.hvd.allgather(data, name=f"hvd_syncbn.{name}", **options)
        return [pickle.loads(part.numpy().tobytes()) for part in everyone.split(sizes.tolist())]


def key(process_set: Any) -> str:
    """The name by which operators know a process set. torch.compile traces it."""
    return horovod.key(horovod.process_set_id(process_set))


ranks_of = horovod.ranks_of


def process_set_of(key: str) -> Any:
    """The process set that a key names."""
    return horovod.process_set_of("torch", key)


def groups(size: int | None) -> Groups:
    """The process sets of ``groups``."""
    return horovod.groups(horovod.require("torch"), size)
