"""Builds, tests and measures the CUDA kernels on this machine's GPU: `python -m benchmarks.gpu --out FOLDER`.

Stages, in this order; each needs the build and no other:
    build      the native libraries: the carried ones if they fit this machine, else by CMake; and Horovod
    test       the bytes of every kernel and of the layer against the CPU's, in up to 4 processes
    speed      the kernels beside torch.nn.SyncBatchNorm's, F.batch_norm and a copy of the same bytes; a ResNet-50 step
    ranks      NCCL at size 1, `hvd-syncbn verify` alone and with 2 ranks on one GPU, and 2 GPUs if there are
    sanitize   compute-sanitizer: memcheck, racecheck, synccheck and initcheck
    profile    Nsight Compute over eight kernels

Every stage has a time limit. The time that a stage does not use is added to the later ones. After every stage FOLDER has
summary.json, summary.txt and logs.tar.gz with the output and the figures of all programs so far.

The machine needs no network. `python -m benchmarks.gpu --prepare FOLDER` puts into a folder what it would have to build, and
`--carried FOLDER` finds it there. `--rehearse` runs all stages without a GPU, against stand-ins: it tests this program.

Exit status: 0 if all stages passed, 1 if one failed, 2 if none failed and one could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import carried, processes, rehearsal, stages
from benchmarks.gpu.processes import BUILD, FAILED, NOT_RUN, PASSED, Result, Stage

STAGES: dict[str, tuple[Callable[[Stage], Result], int]] = {
    "build": (stages.build, 130),
    "test": (stages.test, 100),
    "speed": (stages.speed, 80),
    "ranks": (stages.ranks, 60),
    "sanitize": (stages.sanitize, 70),
    "profile": (stages.profile, 35),
}
"""What runs a stage, and its time limit in seconds. With carried libraries most of the build's time is added to the others."""

TOTAL_S = 480
"""Of a run; the limits add up to less."""

REHEARSAL_FACTOR = 5
"""Of the limits in a rehearsal, which runs on few cores beside other work."""

_LOGS = BUILD / "logs"
_NOT_REACHED = "not reached"
_ARCHIVE_BYTES = 14 << 20  # before compression; larger files are left out, the largest first

Summary = dict[str, dict[str, Any]]


def run(names: list[str], out: Path, folder: Path | None, factor: int = 1, logs: Path = _LOGS) -> Summary:
    """Run stages, and write the summary and the archive after every one.

    Args:
        names: of the stages.
        out: the folder for the summary and the archive.
        folder: what was carried, or None.
        factor: of the limits.
        logs: the folder for the programs' output.

    Returns:
        By name the status, a sentence, and the seconds.
    """
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    summary: Summary = {name: {"status": NOT_RUN, "what": _NOT_REACHED, "seconds": 0.0} for name in names}
    write(summary, out, logs)
    begin = time.monotonic()
    limit = 0
    for name in names:
        function, seconds = STAGES[name]
        limit += factor * seconds
        start = time.monotonic()
        if name != "build" and "build" in summary and summary["build"]["status"] != PASSED:
            result = Result(NOT_RUN, "build did not pass")
        else:
            left = begin + limit - start
            print(f"--- {name}, at most {left:.0f} s", flush=True)
            try:
                result = function(Stage(logs, folder, left))
            except Exception as error:  # the other stages go on
                result = Result(FAILED, f"{type(error).__name__}: {error}")
        taken = round(time.monotonic() - start, 1)
        summary[name] = {"status": result.status, "what": result.what, "seconds": taken}
        write(summary, out, logs)
        print(text({name: summary[name]}), flush=True)
        if result.status == FAILED:
            show_ends(logs, start)
    return summary


def show_ends(logs: Path, start: float) -> None:
    """Print the ends of the logs that a failed stage wrote: the archive may not be at hand."""
    since = time.time() - (time.monotonic() - start)
    for log in sorted(logs.glob("*.log")):
        if log.stat().st_mtime >= since:
            print(f"--- the end of {log.name}\n{processes.last_lines(log)}", flush=True)


def write(summary: Summary, out: Path, logs: Path) -> None:
    """Write the summary, twice, and pack the logs; each file is replaced when it is whole."""
    files = sorted((path for path in logs.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    packed, size = [], 0
    for path in files:
        size += path.stat().st_size
        if size <= _ARCHIVE_BYTES:
            packed.append(path)
    left_out = [path.name for path in files if path not in packed]
    with tarfile.open(out / ".logs.tar.gz", "w:gz") as archive:
        for path in sorted(packed):
            archive.add(path, Path("logs") / path.relative_to(logs))
    (out / ".logs.tar.gz").replace(out / "logs.tar.gz")
    content = {"stages": summary, "left_out": left_out}
    for name, said in (("summary.json", json.dumps(content, indent=1)), ("summary.txt", text(summary))):
        (out / f".{name}").write_text(said + "\n")
        (out / f".{name}").replace(out / name)


def text(summary: Summary) -> str:
    """Return the summary as text. It needs no package, because some may be missing."""
    return "\n".join(f"{name:<9} {row['status']:<8} {row['seconds']:6.1f} s  {row['what']}" for name, row in summary.items())


def plan(names: list[str]) -> str:
    """Return the stages with their limits as text."""
    limits = {name: STAGES[name][1] for name in names}
    limits["together"] = sum(limits.values())
    return "\n".join(f"{name:<9} at most {limit:4d} s" for name, limit in limits.items())


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; wrong ones end the program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for the summary and the archive")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"some of {','.join(STAGES)}")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="build what a GPU machine takes along, and stop")
    parser.add_argument("--carried", type=Path, metavar="FOLDER", help="what --prepare made")
    parser.add_argument("--plan", action="store_true", help="print the time limits, and stop")
    parser.add_argument("--rehearse", action="store_true", help="run all stages against stand-ins for the GPU and its tools")
    args = parser.parse_args(argv)
    if unknown := set(args.stages.split(",")) - set(STAGES):
        parser.error(f"--stages takes some of {','.join(STAGES)}. Received: {','.join(sorted(unknown))}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the chosen stages."""
    args = parse(argv)
    names = [name for name in STAGES if name in args.stages.split(",")]
    if args.prepare is not None:
        carried.prepare(args.prepare.resolve())
        return 0
    print(plan(names), flush=True)
    if args.plan:
        return 0
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        if args.rehearse:
            os.environ.update(rehearsal.environment())
        factor = REHEARSAL_FACTOR if args.rehearse else 1
        summary = run(names, out, args.carried and args.carried.resolve(), factor)
    finally:
        processes.end_all()
    print(f"\n{text(summary)}\n{out / 'logs.tar.gz'}")
    found = {row["status"] for row in summary.values()}
    return 1 if FAILED in found else 2 if NOT_RUN in found else 0


if __name__ == "__main__":
    sys.exit(main())
