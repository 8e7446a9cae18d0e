"""Prints how long the moment kernels' arithmetic takes beside their memory traffic, by GPU: a table for docs/cuda_notes.md.

Instructions of an element are counted in the SASS of the inner loops; rates are published ones, at the boost clock. Needs
nvcc and nvdisasm (pip install nvidia-cuda-nvdisasm). Nothing is measured.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tools.cuda_registers import CSRC, FLAGS, demangle


class Gpu(NamedTuple):
    """Published figures of a GPU."""

    architecture: str
    multiprocessors: int
    ghz: float
    gb_per_s: float
    float64: int  # operations per cycle and multiprocessor
    conversions: int  # to float64, per cycle and multiprocessor


# float64: the data sheets' TFLOPS / (2 * multiprocessors * clock). conversions: the table of arithmetic throughput in the CUDA
# programming guide up to 9.0; newer ones are taken to be like those with as much float64.
GPUS = {
    "T4": Gpu("75", 40, 1.59, 320, 2, 2),
    "A10": Gpu("86", 72, 1.695, 600, 2, 2),
    "L4": Gpu("89", 58, 2.04, 300, 2, 2),
    "RTX 4090": Gpu("89", 128, 2.52, 1008, 2, 2),
    "RTX 5090": Gpu("120", 170, 2.407, 1792, 2, 2),
    "A100 80GB": Gpu("80", 108, 1.41, 2039, 32, 16),
    "H100 SXM": Gpu("90", 132, 1.98, 3350, 64, 16),
    "H200": Gpu("90", 132, 1.98, 4800, 64, 16),
    "B200": Gpu("100", 148, 1.98, 7700, 64, 16),
    "B300": Gpu("103", 148, 2.11, 8000, 2, 2),
}
ISSUED = 128  # thread instructions per cycle and multiprocessor

# By heading: the source file, the kernel, and bytes that are read of an element.
LOOPS = {
    "forward float32": ("forward_moments", "moments<Rows<4>, ForwardTerms<float>>", 4),
    "forward bfloat16": ("forward_moments", "moments<Rows<4>, ForwardTerms<BFloat16>>", 2),
    "... channels last": ("forward_moments", "moments<Columns<2>, ForwardTerms<BFloat16>>", 2),
    "... 2-D float32": ("forward_moments", "moments<Cells, ForwardTerms<float>>", 4),
    "backward float32": ("backward_moments", "moments<Rows<4>, BackwardTerms<float>>", 8),
    "backward bfloat16": ("backward_moments", "moments<Rows<4>, BackwardTerms<BFloat16>>", 4),
}
# Where float64 is little, 16-bit forward moments count in integers: for each element one conversion to an integer. What a lane
# and the fold of a piece still do in float64 counts there, by hand: operations and conversions of an element.
LITTLE_FLOAT64 = 2
INTEGER_CONVERSIONS = 16  # per cycle and multiprocessor, the least that the table has for conversions of 32 bits
INTEGER_FOLDS = {"Rows<4>": (8 * (8 + 30) / 1024, 8 * 8 / 1024), "Columns<2>": ((4 * 32 + 6) / 1024, 4 * 16 / 1024)}


class Count(NamedTuple):
    """Instructions of one element."""

    all: float
    float64: float
    conversions: float
    to_integer: float = 0


@cache
def disassembly(source: str, architecture: str) -> str:
    """The SASS of a source file."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = ["nvcc", *FLAGS, f"-arch=sm_{architecture}", "-cubin", str(CSRC / "cuda" / f"{source}.cu")]
        subprocess.run([*command, "-o", str(cubin)], check=True)
        return subprocess.run(["nvdisasm", "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def count(sass: str, kernel: str) -> Count:
    """Instructions of an element in the innermost loop of a kernel that sums.

    An element has one float64 multiply-add, or one conversion to an integer.
    """
    sections = re.split(r"^\.text\.(\S+):$", sass, flags=re.MULTILINE)
    body = next(text for name, text in zip(sections[1::2], sections[2::2], strict=True) if demangle(name) == kernel)
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in body.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)", line):
            instructions.append(found[1])
            if (target := re.search(r"`\((\.L_\w+)\)", found[2])) and found[1].startswith("BRA") and target[1] in labels:
                loops.append(instructions[labels[target[1]] :])
    if "IntegerTerms" in kernel:
        loop = min((loop for loop in loops if _converts(loop) >= 4), key=len)
        float64, conversions = next(fold for form, fold in INTEGER_FOLDS.items() if form in kernel)
        return Count(len(loop) / _converts(loop), float64, conversions, 1)
    summing = [loop for loop in loops if sum(name == "DFMA" for name in loop) >= 4]
    innermost = min(summing, key=lambda loop: _adds(loop) if "Cells" not in kernel else -_adds(loop))
    elements = sum(name == "DFMA" for name in innermost)
    float64 = sum(re.match(r"D(ADD|FMA|MUL|SETP|MNMX)", name) is not None for name in innermost)
    conversions = sum(name.startswith("F2F.F64") for name in innermost)
    # Most of the loop for 2-D input is for values that do not fit where the others are, which is rare.
    issued = 0 if "Cells" in kernel else len(innermost)
    return Count(issued / elements, float64 / elements, conversions / elements)


def _converts(loop: list[str]) -> int:
    """Conversions to integers."""
    return sum(name.startswith("F2I") for name in loop)


def _adds(loop: list[str]) -> float:
    """float64 additions of an element: 2-D input, where each element is split, has the most."""
    return sum(name == "DADD" for name in loop) / sum(name == "DFMA" for name in loop)


def ratios(gpu: Gpu, found: Count, bytes_read: int) -> tuple[float, float]:
    """Time of the arithmetic over the time of the memory: with float64 and conversions side by side, and in turn."""
    memory = bytes_read * gpu.multiprocessors * gpu.ghz / gpu.gb_per_s  # cycles of an element
    float64, conversions = found.float64 / gpu.float64, found.conversions / gpu.conversions
    issue = max(found.all / ISSUED, found.to_integer / INTEGER_CONVERSIONS)
    return max(float64, conversions, issue) / memory, max(float64 + conversions, issue) / memory


def main() -> None:
    """Print the table."""
    print(f"| GPU | {' | '.join(LOOPS)} |\n|{'---|' * (len(LOOPS) + 1)}")
    for name, gpu in GPUS.items():
        cells = []
        for source, kernel, bytes_read in LOOPS.values():
            if gpu.float64 == LITTLE_FLOAT64:
                kernel = kernel.replace("ForwardTerms<BFloat16>", "IntegerTerms<BFloat16>")
            least, most = ratios(gpu, count(disassembly(source, gpu.architecture), kernel), bytes_read)
            cells.append(f"{least:.1f} to {most:.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    for heading, (source, kernel, _) in LOOPS.items():
        found = count(disassembly(source, "90"), kernel)
        issued = f", {found.all:.1f} instructions" if found.all else ""
        print(f"{heading}: {found.float64:.1f} float64, {found.conversions:.1f} conversions{issued}")


if __name__ == "__main__":
    main()
