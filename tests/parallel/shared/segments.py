"""What the checks of both frameworks ask about the memory that the ranks of a host share (patch 0038)."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SEGMENT = re.compile(r"/dev/shm/horovod-\S+( \(deleted\))?$", re.MULTILINE)
TOO_SMALL = 1 << 20  # bytes: less than a segment of two ranks


def segments() -> int:
    """The number of segments that this process has mapped. Their names are gone, so that nothing can be left."""
    found = SEGMENT.findall(Path("/proc/self/maps").read_text())
    assert all(found), "a segment still has a name"
    return len(found)


@contextlib.contextmanager
def short_memory() -> Iterator[None]:
    """Make the allocation of a segment fail, as in a full /dev/shm."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (TOO_SMALL, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def sums_where_memory_is_short(hvd: Any, check_sums: Callable[[], None]) -> None:
    """Check sums where one rank has no memory, which is enough for all to use sockets, and after the next start."""
    limit = short_memory() if hvd.rank() == 0 else contextlib.nullcontext()
    hvd.shutdown()
    with limit:
        hvd.init()
    assert segments() == 0
    check_sums()
    hvd.allgather_object(None, name="all are through")  # the first to leave ends Horovod for all
    hvd.shutdown()
    hvd.init()
    assert segments() == 1
    check_sums()
