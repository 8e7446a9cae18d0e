"""Runs a group of checks under `torchrun`, as job.py does under `horovodrun`; in the ranks Horovod cannot be imported.

As a program (`python -m tests.parallel.torchrun GROUP FOLDER`) this module is one rank.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from datetime import timedelta
from functools import cache
from pathlib import Path

from hvd_syncbn.cli.job import end
from tests.needs import need
from tests.parallel.job import ROOT, Job, outcomes_in, rank_environment, run_checks


def checks(group: str) -> list[str]:
    """The names of a group's checks, read without importing a framework."""
    text = (Path(__file__).parent / "checks" / f"{group}.py").read_text()
    return re.findall(r"^def (check_\w+)", text, re.MULTILINE)


@cache
def run(group: str, ranks: int, timeout: float = 300, agent: bool = True) -> Job:
    """Runs a group once per session and rank count.

    Without torchrun's `agent`, which ends all ranks where one fails, ranks are plain processes.
    """
    need("torch")
    module = ["-m", "tests.parallel.torchrun", group]
    environment = rank_environment() | {"WORLD_SIZE": str(ranks)}
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output").open("w+") as output:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        commands = [[*torchrun, *module, folder]] if agent else [[*module, folder]] * ranks
        processes = [
            subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment | ({} if agent else {"RANK": str(rank)}),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )
            for rank, command in enumerate(commands)
        ]  # fmt: skip
        said = ""
        try:
            for process in processes:
                process.wait(timeout)
        except subprocess.TimeoutExpired:
            said = f"\n(ended after {timeout} s)"
        finally:
            for process in processes:
                end(process)
        outcomes = outcomes_in(folder, ranks)
        output.seek(0)
        return Job(outcomes, output.read() + said)


def main() -> None:
    """One rank."""
    group, folder = sys.argv[1:]
    sys.modules["horovod"] = None  # type: ignore[assignment]  # to import it is an error
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    dist.init_process_group(
        "gloo",
        init_method=None if under_torchrun else f"file://{folder}/store",
        rank=-1 if under_torchrun else rank,
        world_size=-1 if under_torchrun else int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=120),
    )
    module = importlib.import_module(f"tests.parallel.checks.{group}")
    run_checks(group, folder, rank)
    if not getattr(module, "ENDS_WITH_A_DEAD_RANK", False):
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
