"""The groups of ranks that share a batch: the one owner of them."""

from __future__ import annotations

from typing import Any

from hvd_syncbn import horovod
from hvd_syncbn.tf_impl.horovod import Group

# The latest group under each key. An op holds a string, and its gradient has only that.
_groups: dict[str, Group] = {}


def find(process_set: Any) -> Group:
    """Return the group behind a ``process_set`` argument (None is all ranks), asking Horovod whether it still exists.

    Raises:
        RuntimeError: Horovod is missing or not initialised, or this process was forked after it was.
        ValueError: the process set is not registered with Horovod, or this rank is not in it.
    """
    if isinstance(process_set, Group):
        return process_set
    group = Group(process_set)
    _groups[group.key] = group
    return group


def known(key: str) -> Group:
    """Return the group of a key."""
    group = _groups.get(key)
    return find(horovod.process_set_of("tensorflow", key)) if group is None else group
