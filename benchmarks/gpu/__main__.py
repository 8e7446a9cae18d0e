"""Builds, tests, checks and measures the CUDA kernels on this machine's GPU: `python -m benchmarks.gpu --out FOLDER`.

Stages, in this order; one that needs an earlier one which did not pass is not run:
    build      the core and the PyTorch adapter, by CMake; for this GPU, or for all where none is here
    test       the bytes of every kernel and of the layer against the CPU's
    ranks      Horovod built from its source, then `hvd-syncbn verify` alone and with 2 ranks on the one GPU
    sanitize   compute-sanitizer memcheck and racecheck over a test that launches every kernel
    speed      beside torch.nn.SyncBatchNorm's kernels, F.batch_norm and a copy of the same bytes

The machine needs no network. What a bare one with PyTorch and nvcc lacks, `python -m benchmarks.gpu --prepare FOLDER` puts into
a folder of a few MB to take along, and `--carried FOLDER` finds it there.

It ends with a table of what every stage did (summary.json beside it). Exit status: 0 if all passed, 1 if one failed, 2 if none
failed and one could not run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.gpu import build
from benchmarks.gpu.build import FAILED, NOT_RUN, PASSED, Result

STAGES: dict[str, tuple[Callable[[Path, Path | None], Result], tuple[str, ...]]] = {
    "build": (build.build, ()),
    "test": (build.test, ("build",)),
    "ranks": (build.ranks, ("build",)),
    "sanitize": (build.sanitize, ("build", "test")),
    "speed": (build.speed, ("build", "test")),
}
"""What runs a stage, and the stages that have to have passed, if they were asked for."""


def run(stages: list[str], out: Path, carried: Path | None) -> dict[str, dict[str, object]]:
    """Run the stages; by name the status, what is to say, and the seconds."""
    done: dict[str, Result] = {}
    summary: dict[str, dict[str, object]] = {}
    for name in stages:
        stage, needs = STAGES[name]
        lacking = [need for need in needs if need in done and done[need].status != PASSED]
        start = time.monotonic()
        if lacking:
            result = Result(NOT_RUN, f"{lacking[0]} did not pass")
        else:
            print(f"--- {name}", flush=True)
            try:
                result = stage(out, carried)
            except Exception as error:  # a stage that breaks is one that failed, and the others go on
                result = Result(FAILED, f"{type(error).__name__}: {error}")
        done[name] = result
        seconds = round(time.monotonic() - start, 1)
        summary[name] = {"status": result.status, "what": result.what, "seconds": seconds}
    return summary


def show(summary: dict[str, dict[str, object]]) -> None:
    """The summary for a person."""
    table = Table(title="make gpu", title_justify="left")
    table.add_column("stage")
    table.add_column("", no_wrap=True)
    table.add_column("s", justify="right")
    table.add_column("what", overflow="fold")
    colors = {PASSED: "green", FAILED: "red", NOT_RUN: "yellow"}
    for name, row in summary.items():
        status = str(row["status"])
        table.add_row(name, Text(status, colors[status]), f"{row['seconds']}", Text(str(row["what"])))
    Console().print(table)


def main() -> int:
    """Run the chosen stages."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for logs, the tables and the JSON")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"some of {','.join(STAGES)}")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="fetch what a machine without network lacks, and stop")
    parser.add_argument("--carried", type=Path, metavar="FOLDER", help="what --prepare made")
    args = parser.parse_args()
    if args.prepare is not None:
        build.prepare(args.prepare)
        return 0
    stages = args.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages takes some of {','.join(STAGES)}. Received: {','.join(sorted(unknown))}")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary = run(stages, out, args.carried and args.carried.resolve())
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary)
    found = {row["status"] for row in summary.values()}
    return 1 if FAILED in found else 2 if NOT_RUN in found else 0


if __name__ == "__main__":
    sys.exit(main())
