"""Groups of ranks that share a batch, for PyTorch."""

from __future__ import annotations

from hvd_syncbn.groups import Groups
from hvd_syncbn.torch_impl import ranks


def groups(size: int | None = None) -> Groups:
    """Process sets that deal the ranks of the job out in groups, to synchronize inside each of them.

    All ranks have to call it, with the same size, after ``hvd.init(process_sets="dynamic")`` (or with
    HOROVOD_DYNAMIC_PROCESS_SETS=1) or, under torchrun, ``torch.distributed.init_process_group()``. Neighbours share a group, so
    those of a host stay together. Sets that Horovod has already, as from an earlier call, are taken again. After the reset of
    an elastic job all sets are gone: call it again at the start of the function that ``hvd.elastic.run`` decorates, where all
    ranks come after every reset, and convert the model with the new set. (In a callback of
    ``state.register_reset_callbacks`` Horovod does not forgive the loss of one more rank.)

    The first rank to end shuts Horovod down for all, also for a group that is still at work: end the job together, with
    ``hvd.barrier()`` as the last thing that every rank does.

    Args:
        size: ranks that a group has at least: groups differ by one rank at most where the job's ranks are no multiple of it.
            None makes a group of each host's ranks.

    Returns:
        ``(mine, all)``: the ``horovod.ProcessSet`` of this rank's group, for ``process_set=``, and the list of all of them. One
        group of all ranks is ``hvd.global_process_set``. Under torchrun they are process groups of torch.distributed, and those
        of other ranks' groups are ``GroupMember.NON_GROUP_MEMBER``.

    Raises:
        ValueError: on all ranks, if their sizes differ or one is no positive number, or if Horovod takes no new sets.
        RuntimeError: Horovod is missing or not initialised.

    Warns:
        UserWarning: the job has fewer ranks than ``size``.

    Example::

        hvd.init(process_sets="dynamic")
        model = convert_sync_batchnorm(model, process_set=groups(8).mine)
    """
    return ranks.groups(size)
