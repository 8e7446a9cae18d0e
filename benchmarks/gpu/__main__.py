"""Builds, tests, checks and measures the CUDA kernels on this machine's GPU: `python -m benchmarks.gpu --out FOLDER`.

Stages, in this order; what follows a failure of the tests would mean nothing, so it is not run:
    build      the core and the PyTorch adapter for this GPU, by CMake
    test       the bytes of every kernel and of the layer against the CPU's
    sanitize   compute-sanitizer memcheck and racecheck over a test that launches every kernel, where the tool is there
    speed      beside torch.nn.SyncBatchNorm's kernels, F.batch_norm and a copy of the same bytes
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks.gpu import build

STAGES = ("build", "test", "sanitize", "speed")


def main() -> int:
    """Runs the chosen stages; the exit status is 0 if all went well."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for logs, the table and the JSON")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"some of {','.join(STAGES)}")
    args = parser.parse_args()
    stages = args.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages takes some of {','.join(STAGES)}. Received: {','.join(sorted(unknown))}")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    if lacks := build.missing():
        print("This machine lacks:", *lacks, sep="\n  ", file=sys.stderr)
        return 2
    if "build" in stages:
        print("build: about a minute")
        build.build(out / "build.log")
    if "test" in stages and build.pytest(out / "test.log"):
        print(f"The tests failed, so nothing is measured. See {out / 'test.log'}", file=sys.stderr)
        return 1
    if "sanitize" in stages:
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            print("sanitize: skipped, there is no compute-sanitizer on PATH")
        for tool in ("memcheck", "racecheck") if sanitizer else ():
            prefix = (str(sanitizer), "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no")
            if build.pytest(out / f"{tool}.log", "-k", "small_steps", prefix=prefix):
                print(f"compute-sanitizer {tool} failed. See {out / f'{tool}.log'}", file=sys.stderr)
                return 1
            print(f"sanitize: {tool} is clean")
    if "speed" in stages:
        code = "import sys; sys.path.append('.'); from benchmarks.gpu import speed; speed.main(sys.argv[1])"
        return build.run(out / "speed.log", "-c", code, str(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
