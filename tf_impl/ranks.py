"""The groups of ranks that share a batch: the one owner of them."""

from __future__ import annotations

from typing import Any

from hvd_syncbn import horovod as core
from hvd_syncbn.tf_impl import distributed, horovod

Group = horovod.Group | distributed.Group

# The latest group under each key. An op holds a string, and its gradient has only that.
_groups: dict[str, horovod.Group] = {}


def find(process_set: Any, who: str = "the model") -> Group:
    """Return the group behind a ``process_set`` argument, asking its engine whether it still exists.

    Args:
        process_set: a process set of Horovod, or a tuple of the ranks of a registered one. None is the replicas of the current
            tf.distribute strategy if there are several, else all ranks of Horovod.
        who: what trains on it, for an error.

    Raises:
        RuntimeError: there is no engine, or this process was forked after it was initialized.
        ValueError: the engine does not know the group, or this rank is not in it.
    """
    if isinstance(process_set, Group):
        return process_set
    if distributed.is_group(process_set):
        return distributed.Group(process_set)
    group = horovod.Group(process_set, who)
    _groups[group.key] = group
    return group


def known(key: str) -> Group:
    """Return the group of a key."""
    if key.startswith(distributed.PREFIX):
        return distributed.Group(None)
    group = _groups.get(key)
    return find(core.process_set_of("tensorflow", key)) if group is None else group
