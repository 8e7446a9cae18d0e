"""torch.distributed as the engine that sums packets. Its collective itself is in ``csrc/distributed.cc``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hvd_syncbn.groups import Groups, deal

PREFIX = "distributed:"

_forked = False  # after torch.distributed was initialized: its threads are not in this process


def _after_fork_in_child() -> None:
    global _forked
    _forked = dist.is_initialized()


os.register_at_fork(after_in_child=_after_fork_in_child)


class Group:
    """Ranks that share a batch: a process group of torch.distributed."""

    def __init__(self, process_set: Any) -> None:
        """Find a process group, that of a 1-D ``DeviceMesh``, or the default one (None).

        Raises:
            RuntimeError: this process was forked after torch.distributed was initialized, or DDP's `join` lets ranks end early.
            ValueError: this rank is not in the group, or the mesh has several dimensions.
        """
        if process_set is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"rank {dist.get_rank()} is not in the process group that it should share a batch with")
        self.key = key(process_set)
        self.process_group = process_set_of(self.key)
        self.size = self.process_group.size()
        if self.size > 1 and _forked:
            raise RuntimeError(
                "torch.distributed does not run in a process that was forked after `init_process_group()`: a collective would "
                "wait for its timeout. Call `.eval()` on a model that a dataset's transform uses, or spawn the process. "
                f"Received: process {os.getpid()}, forked by process {os.getppid()}"
            )

    @property
    def rank(self) -> int:
        """This rank's number in the job."""
        return dist.get_rank()

    @property
    def ranks(self) -> list[int]:
        """The numbers of the group's ranks in the job."""
        return dist.get_process_group_ranks(self.process_group)

    def sum(self, packet: Tensor, name: str) -> None:
        """Sum a packet over the ranks, in place."""
        torch.ops.hvd_syncbn.sum_over_distributed_(packet, name, self.key)

    def start_sum(self, packet: Tensor, name: str) -> Callable[[], None]:
        """Sum a packet over the ranks, in place, at once: these collectives have an order, not names."""
        self.sum(packet, name)
        return lambda: None

    def gather(self, value: object, name: str) -> list[Any]:
        """Return the values of all ranks of the group. Collectives of torch.distributed have no names."""
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.process_group)
        return everyone

    def agree(self, packet: Tensor, name: str) -> None:
        """Raise an error on every rank unless all are about to sum a packet of one name and size."""
        if packet.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a call before the capture has asked
        everyone = self.gather((name, packet.numel()), name)
        if len(set(everyone)) == 1:
            return
        by_call: dict[tuple[str, int], list[int]] = {}
        for rank, call in zip(self.ranks, everyone, strict=True):
            by_call.setdefault(call, []).append(rank)
        received = "; ".join(f"{name!r} with {words} integers on ranks {ranks}" for (name, words), ranks in by_call.items())
        raise ValueError(
            f"the ranks disagree about the collective {name!r}: every rank has to call the same layers in the same order, with "
            f"the same number of channels. Layers that are not converted are numbered as they are made: make the same ones on "
            f"every rank, or set `layer.collective_name`. Received: {received}"
        )


@torch.compiler.assume_constant_result
def _check_no_early_end() -> None:
    """Raise an error, in the first step of every rank, in DDP's `join`: its hook repeats only DDP's collectives."""
    ddp: Any = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or ddp.process_group.size() == 1:
        return
    if ddp._join_config.enable and not ddp._join_config.throw_on_early_termination:
        raise RuntimeError(
            "a rank that has joined does not take part in synchronized batch normalization: call "
            "`model.join(throw_on_early_termination=True)`, which ends the epoch on every rank, or leave out `join` and give "
            "ranks that have run out of batches empty ones (`x[:0]`). "
            "Received: DistributedDataParallel in `join` with throw_on_early_termination=False"
        )


def is_group(process_set: Any) -> bool:
    """Whether a ``process_set`` argument is one of torch.distributed; None is if Horovod is not initialized."""
    if process_set is None:
        hvd: Any = sys.modules.get("horovod.torch")
        return dist.is_initialized() and not (hvd is not None and hvd.is_initialized())
    # One class at a time: torch.compile answers no for two.
    if isinstance(process_set, dist.ProcessGroup):
        return True
    return isinstance(process_set, dist.DeviceMesh) or process_set is dist.GroupMember.NON_GROUP_MEMBER


def key(process_set: Any) -> str:
    """The name by which operators know a group. torch.compile traces it."""
    _check_no_early_end()
    if process_set is None:
        process_set = dist.group.WORLD
    if isinstance(process_set, dist.DeviceMesh):
        if process_set.ndim != 1:
            raise ValueError(
                "expected a mesh of one dimension, whose ranks share a batch: pass a dimension of it, such as mesh['dp']. "
                f"Received: {process_set}"
            )
        process_set = process_set.get_group()
    return PREFIX + process_set.group_name


def ranks_of(process_set: Any) -> list[int]:
    """The ranks of a group."""
    return Group(process_set).ranks


def process_set_of(key: str) -> dist.ProcessGroup:
    """The process group that a key names."""
    return dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(key.removeprefix(PREFIX)))


def groups(size: int | None) -> Groups:
    """The process groups of ``groups``."""
    world = Group(None)
    wanted = deal(size, lambda value: world.gather(value, "groups"))
    if len(wanted) == 1:
        return Groups(world.process_group, [world.process_group])
    found = [dist.new_group(ranks) for ranks in wanted]
    return Groups(next(group for group, ranks in zip(found, wanted, strict=True) if world.rank in ranks), found)


def _agree(packet: Tensor, name: str, key: str) -> None:
    Group(process_set_of(key)).agree(packet, name)


torch.library.define("hvd_syncbn::agree", "(Tensor packet, str name, str group) -> ()")
torch.library.impl("hvd_syncbn::agree", ["CPU", "CUDA"], _agree)
