"""Ranks that wait for each other for good: what test_stalls.py has every rank of a job do, in either framework.

Horovod shuts the job down, so each case begins with a new `hvd.init()`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As checks/*_stall.py run them: what rank 0 does, and what the others do.
CASES = {
    "check_a_layer_that_others_lack": (["trunk", "trunk", "extra", "head"], ["trunk", "trunk", "head"]),
    "check_another_order": (["trunk", "left", "right"], ["trunk", "right", "left"]),
    "check_a_rank_stops_early": (["trunk", "trunk", "trunk"], ["trunk", "trunk"]),
}


def run(hvd: Any, case: str, layer: Callable[[str], Callable[[], Any]], errors: tuple[type[Exception], ...]) -> dict[str, Any]:
    """Run a case's layers on this rank until Horovod gives up; the error, and seconds until then.

    Args:
        hvd: the framework's Horovod.
        case: of CASES.
        layer: a layer of that name, as a function that trains it for a step.
        errors: those that may come.
    """
    if not hvd.is_initialized():
        hvd.init()
    # Nobody may be told by a file of another rank's case.
    stopped = Path(os.environ["STALL_FOLDER"]) / f"{case}-{hvd.size()}"
    names = CASES[case][min(hvd.rank(), 1)]
    layers = {name: layer(f"{case}.{name}") for name in dict.fromkeys(names)}
    start = time.monotonic()
    try:
        for name in names:
            layers[name]()
        # This one has no more to do, and does something else. When it comes back it has to be told, too.
        while not stopped.exists() and time.monotonic() < start + 60:
            time.sleep(0.05)
        layers[names[0]]()
    except errors as error:
        stopped.touch()
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - start}
    finally:
        hvd.shutdown()
    raise AssertionError("no error")
