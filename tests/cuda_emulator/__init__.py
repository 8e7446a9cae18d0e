"""The CUDA kernels without a GPU: compiles them for the CPU, once per state of the sources."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "hvd_syncbn" / "csrc"
# Misaligned accesses fault on a GPU and not here, so they are checked for.
FLAGS = [
    *("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"),
]


def _built(source: str) -> Path:
    """A library of one source file and what it includes, built if anything has changed."""
    sources = sorted(
        path for folder in (HERE, CSRC) for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cc")
    )
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"hvd_syncbn_cuda_emulator_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    built = folder / f"{Path(source).stem}_{digest.hexdigest()[:16]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            out = Path(scratch) / "out.so"
            includes = [f"-I{HERE}", f"-I{CSRC / 'cuda'}"]
            subprocess.run(["g++", *FLAGS, *includes, "-x", "c++", str(HERE / source), "-o", str(out)], check=True)
            out.rename(built)
    return built


@cache
def kernels() -> Path:
    """The library of the kernels."""
    return _built("emulated.cc")


@cache
def driver() -> Path:
    """A library with the functions of the CUDA driver that tests/gpu/driver.py calls."""
    return _built("driver.cc")


@cache
def library() -> ctypes.CDLL:
    """The kernels."""
    return ctypes.CDLL(str(kernels()))


def configure(multiprocessors: int, seed: int, resident: int = 4, shared_kib: int = 64, float64_ratio: int = 2) -> None:
    """Sets the device, and where the order of threads and blocks starts.

    Args:
        multiprocessors: how many it has.
        seed: where the order starts.
        resident: blocks of any kernel that a multiprocessor runs at a time.
        shared_kib: shared memory of a multiprocessor.
        float64_ratio: float32 operations in the time of a float64 operation.
    """
    settings = map(ctypes.c_int, (multiprocessors, resident, 1024 * shared_kib, float64_ratio))
    library().cuda_emulator_set(*settings, ctypes.c_uint64(seed))


def blocks() -> int:
    """Blocks of the last launch."""
    library().cuda_emulator_blocks.restype = ctypes.c_int64
    return int(library().cuda_emulator_blocks())


def occupancy_calls() -> int:
    """How often the kernels have asked the runtime for an occupancy."""
    library().cuda_emulator_occupancy_calls.restype = ctypes.c_int64
    return int(library().cuda_emulator_occupancy_calls())


def integers() -> tuple[int, int]:
    """Elements that became integers in the last launch, and lanes that were added up again in float64."""
    counts = library().cuda_emulator_integers, library().cuda_emulator_float64_lanes
    for count in counts:
        count.restype = ctypes.c_int64
    return int(counts[0]()), int(counts[1]())


def prefetched() -> NDArray[np.uint64]:
    """The addresses that the last launch prefetched."""
    library().cuda_emulator_prefetched.restype = ctypes.c_int64
    count = library().cuda_emulator_prefetched(None, ctypes.c_int64(0))
    addresses = np.zeros(count, np.uint64)
    library().cuda_emulator_prefetched(ctypes.c_void_p(addresses.ctypes.data), ctypes.c_int64(count))
    return addresses


class Memory:
    """What `cuda_kernels` needs of a device: here its memory is the host's."""

    def library(self) -> ctypes.CDLL:
        """The emulated kernels."""
        return library()

    def give(self, array: NDArray[Any], is_output: bool) -> int:
        """Where a kernel finds the array."""
        return int(array.ctypes.data)

    def take_back(self) -> None:
        """Nothing: kernels have run when their launch returns, and wrote to the arrays."""
