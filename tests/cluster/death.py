"""What the workers of elastic jobs share: a log, and the plan by which they die; see elastic.py."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

WORKER = f"{os.environ.get('HOROVOD_HOSTNAME')}:{os.environ.get('HOROVOD_ELASTIC_SLOT')}"


def log(folder: Path, **entry: Any) -> None:
    """Add a line to this process's log; in the file even if the next thing is its death."""
    with (folder / f"{WORKER}-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps({"worker": WORKER, "pid": os.getpid(), "time": time.time(), **entry}) + "\n")


class Plan:
    """`plan.json` of the job's folder; who follows it keeps `step` at the number of the step it is in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.deaths: list[dict[str, Any]] = json.loads((folder / "plan.json").read_text())
        self.step = -1

    def here(self, where: str, rank: int) -> None:
        """Die, if it is time: once in a job for every entry of the plan."""
        for number, death in enumerate(self.deaths):
            now = death["step"] == self.step if death["step"] >= 0 else (self.folder / "now").exists()
            if now and death["where"] == where and death["worker"] in (WORKER, f"rank {rank}"):
                try:
                    (self.folder / f"died{number}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                log(self.folder, event="dies", number=number)
                if death["how"] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("an error in the user's code")
