"""What the checks of both frameworks ask about the memory that the ranks of a host share (patch 0038)."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path

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
