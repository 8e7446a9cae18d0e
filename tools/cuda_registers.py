"""Writes docs/cuda_registers.csv: what ptxas makes of every kernel. Run it where nvcc is, after a change of the CUDA sources.

tests/unit/test_cuda_registers.py holds the table to the sources, and every kernel to no spills and no stack.
"""

from __future__ import annotations

import csv
import hashlib
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "hvd_syncbn" / "csrc"
TABLE = ROOT / "docs" / "cuda_registers.csv"
ARCHITECTURES = ("80", "90")
KERNELS = ("forward_moments", "forward_apply", "backward_moments", "backward_apply")
# As in csrc/cuda/cuda.cmake.
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")

_PROPERTIES = re.compile(
    r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r"\nptxas info\s+: Used (\d+) registers"
)


def digest() -> str:
    """Of every source that a kernel is compiled from."""
    paths = [path for folder in ("common", "cuda", "include") for path in (CSRC / folder).rglob("*") if path.is_file()]
    result = hashlib.sha256()
    for path in sorted(paths):
        result.update(path.relative_to(CSRC).as_posix().encode() + path.read_bytes())
    return result.hexdigest()


def demangle(mangled: str) -> str:
    """The kernel as the table calls it."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"hvd_syncbn::|cuda::|\(anonymous namespace\)::|^void ", "", plain)
    return plain.partition("(")[0].replace(" >", ">")


def measure(kernel: str, architecture: str) -> list[tuple[str, ...]]:
    """Rows of one source file: architecture, kernel, registers, stack, spill stores, spill loads."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, "-Xptxas=-v", f"-arch=sm_{architecture}", "-cubin", str(CSRC / "cuda" / f"{kernel}.cu")]
        result = subprocess.run([*command, "-o", str(Path(folder) / "out.cubin")], capture_output=True, text=True, check=True)
    rows = [
        (architecture, demangle(mangled), registers, stack, stores, loads)
        for mangled, stack, stores, loads, registers in _PROPERTIES.findall(result.stderr)
    ]
    return sorted(rows)


def main() -> None:
    """Compiles everything and writes the table."""
    with TABLE.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("architecture", "kernel", "registers", "stack bytes", "spill stores", "spill loads"))
        for architecture in ARCHITECTURES:
            for kernel in KERNELS:
                writer.writerows(measure(kernel, architecture))
        writer.writerow(("sources", digest(), "", "", "", ""))


if __name__ == "__main__":
    main()
