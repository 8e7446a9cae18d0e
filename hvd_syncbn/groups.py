"""How ``groups`` deals the ranks of a job out, whatever its engine."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple


class Groups(NamedTuple):
    """What ``groups`` returns."""

    mine: Any
    """That of this rank's group, for ``process_set=``: a ``horovod.ProcessSet`` or a ``torch.distributed.ProcessGroup``."""
    all: list[Any]
    """Those of all groups, in the same order on every rank."""


def deal(size: int | None, gather: Callable[[Any], list[Any]]) -> list[list[int]]:
    """Return the ranks of each group, of at least ``size`` ranks or (None) of a host's, after all ranks have agreed on it."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        size_error = f"expected a group size of 1 or more, or None for the ranks of a host. Received: {size!r}"
    else:
        size_error = None
    # Every rank gets every rank's argument, a wrong one, too: all go on, or none.
    host = os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname()
    asked = gather((repr(size), size_error, host))
    sizes = [text for text, *_ in asked]
    errors = [error for _, error, _ in asked if error]
    if len(set(sizes)) > 1:
        raise ValueError(f"expected one group size on all ranks. Received: {', '.join(sizes)} on ranks 0 to {len(sizes) - 1}")
    if errors:
        raise ValueError(errors[0])
    ranks = len(asked)
    if size is None:
        hosts = [host for *_, host in asked]
        return [[rank for rank in range(ranks) if hosts[rank] == host] for host in dict.fromkeys(hosts)]
    if ranks < size:
        warnings.warn(f"the job has {ranks} ranks, fewer than a group of {size}: all of them share a batch", stacklevel=4)
    count = max(1, ranks // size)
    edges = [ranks * i // count for i in range(count + 1)]
    return [list(range(*edges[i : i + 2])) for i in range(count)]
