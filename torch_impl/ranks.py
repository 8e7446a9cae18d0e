"""The groups of ranks that share a batch: the one owner of them."""

from __future__ import annotations

from typing import Any

import torch

from hvd_syncbn.groups import Groups
from hvd_syncbn.torch_impl import distributed, horovod

Group = horovod.Group | distributed.Group

# The latest group under each key. Operators take a string, and a backward pass has only that.
_groups: dict[str, Group] = {}


def find(process_set: Any) -> Group:
    """Return the group behind a ``process_set`` argument, asking its engine whether it still exists.

    None is all ranks of Horovod if it is initialized, else those of torch.distributed if that is.

    Raises:
        RuntimeError: there is no engine, or this process was forked after it was initialized.
        ValueError: the engine does not know the group, or this rank is not in it.
    """
    if isinstance(process_set, Group):
        return process_set
    group = _engine(process_set).Group(process_set)
    _groups[group.key] = group
    return group


def key_of(process_set: Any) -> str | None:
    """Return the key of a group for operators; None where this rank is alone."""
    if torch.compiler.is_compiling():  # the program may run in jobs of other sizes
        return _default_key() if process_set is None else _engine(process_set).key(process_set)
    group = find(process_set)
    return None if group.size == 1 else group.key


def known(key: str) -> Group:
    """Return the group of a key."""
    group = _groups.get(key)
    if group is None:  # in a program that another process has compiled or saved
        group = find((distributed if key.startswith(distributed.PREFIX) else horovod).process_set_of(key))
    return group


def members_of(process_set: Any) -> tuple[int, ...] | None:
    """Return the ranks of a group, None for all of them; without asking whether it still exists."""
    ranks = None if process_set is None else _engine(process_set).ranks_of(process_set)
    return None if ranks is None else tuple(ranks)


def groups(size: int | None) -> Groups:
    """Return new groups of ranks; see ``groups.groups``."""
    found: Groups = _engine(None).groups(size)
    return found


def _engine(process_set: Any) -> Any:
    return distributed if distributed.is_group(process_set) else horovod


@torch.compiler.assume_constant_result
def _default_key() -> str:
    key: str = _engine(None).key(None)
    return key
