"""One rank of a job that runs a template of examples/templates several times, as a user would from the command line.

    python -m tests.parallel.checks.templates FRAMEWORK FOLDER PART

Every rank gets a folder of its own, so that only the files of one rank can be in it.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[3] / "examples" / "templates"
FRAMEWORK, FOLDER = sys.argv[1], Path(sys.argv[2])
STEPS = 45  # of an epoch on two ranks

hvd: Any = importlib.import_module("horovod.torch" if FRAMEWORK == "pytorch" else "hvd_syncbn.keras")
TOLD, METHOD = {
    "pytorch": lambda: (hvd.elastic.ElasticSampler, "record_batch"),
    "keras": lambda: (hvd.elastic.UpdateBatchStateCallback, "on_train_batch_end"),
}[FRAMEWORK]()


def run(name: str, *options: str) -> None:
    """The script, as `python train_FRAMEWORK.py OPTIONS --out FOLDER/NAME/RANK`."""
    script = str(SCRIPTS / f"train_{FRAMEWORK}.py")
    sys.argv = [script, *options, "--out", str(FOLDER / name / str(hvd.rank()))]
    runpy.run_path(script, run_name="__main__")


def dies_after(steps: int) -> None:
    """Rank 1 is killed when the template has counted so many more steps, before Horovod hears of it."""
    count: Callable[..., Any] = getattr(TOLD, METHOD)
    left = steps

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and hvd.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return count(*args, **kwargs)

    setattr(TOLD, METHOD, counted)


def main() -> None:
    hvd.init()
    if FRAMEWORK == "pytorch":
        import torch

        torch.set_num_threads(1)
    if sys.argv[3] == "plain":
        run("whole", "--epochs", "2")
        run("amp", "--epochs", "1", "--amp", "--recalibrate")
        dies_after(STEPS + 20)
        run("killed", "--epochs", "2")
    else:
        run("killed", "--epochs", "2", "--elastic", "--resume")
        dies_after(25)
        run("elastic", "--epochs", "2", "--elastic")


if __name__ == "__main__":
    main()
