"""A progress bar for work that takes more than a second."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")

PATIENCE = 1.0  # seconds without a bar

RANK_VARIABLES = "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"
"""Set by `horovodrun`. Over MPI it sets none, but Open MPI and MPICH set their own."""


def launched_rank() -> int:
    """Return this process's rank from its launcher's environment variables, without Horovod; 0 without a launcher."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def track(items: Iterable[T], description: str, shown: bool, total: int | None = None) -> Generator[T]:
    """Yield ``items`` and, if ``shown``, display a progress bar on standard error after one second.

    Close the generator if it is not read to its end; otherwise the bar stays on the screen.
    """
    start = time.monotonic()
    progress = None
    try:
        for done, item in enumerate(items):
            if shown and progress is None and time.monotonic() - start > PATIENCE:
                columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
                progress = Progress(*columns, console=Console(stderr=True))
                progress.start()
                task = progress.add_task(description, total=total)
            if progress is not None:
                progress.update(task, completed=done)
            yield item
        if progress is not None:
            progress.update(task, completed=done + 1)
    finally:
        if progress is not None:
            progress.stop()
