"""The CUDA kernels without a GPU: compiles them for the CPU, once per state of the sources, and calls them on numpy arrays.

Each function is its C namesake in ``csrc/include/hvd_syncbn/cuda.h``; 16-bit floats are numpy ``uint16`` arrays of their bits.
"""

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

from hvd_syncbn import native
from hvd_syncbn.native import Shape
from hvd_syncbn.protocol import DTYPES

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "hvd_syncbn" / "csrc"
# Misaligned accesses fault on a GPU and not here, so they are checked for.
FLAGS = [
    *("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"),
]


class Vector(ctypes.Structure):
    """A per-channel vector; ``data`` None: absent."""

    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int32))


@cache
def library() -> ctypes.CDLL:
    """The kernels, built if they have changed."""
    sources = sorted(
        path for folder in (HERE, CSRC) for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cc")
    )
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"hvd_syncbn_cuda_emulator_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    built = folder / f"{digest.hexdigest()[:16]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            out = Path(scratch) / "emulated.so"
            includes = [f"-I{HERE}", f"-I{CSRC / 'cuda'}"]
            subprocess.run(["g++", *FLAGS, *includes, "-x", "c++", str(HERE / "emulated.cc"), "-o", str(out)], check=True)
            out.rename(built)
    lib = ctypes.CDLL(str(built))
    lib.hvd_syncbn_cuda_error.restype = ctypes.c_char_p
    return lib


def configure(multiprocessors: int, seed: int) -> None:
    """Sets how many multiprocessors the device says it has, and where the order of threads and blocks starts."""
    library().cuda_emulator_set(ctypes.c_int(multiprocessors), ctypes.c_uint64(seed))


def guarded(like: NDArray[Any], offset: int = 0) -> NDArray[Any]:
    """An array of the same form ``offset`` elements past a 64-byte boundary, between bytes that ``intact`` checks."""
    size = like.nbytes
    block = np.full(size + 256, 0x5A, np.uint8)
    start = -block.ctypes.data % 64 + 64 + offset * like.itemsize
    inside = block[start : start + size].view(like.dtype).reshape(like.shape)
    inside[...] = like
    return inside


def intact(array: NDArray[Any]) -> bool:
    """Whether nothing was written around an array that ``guarded`` made."""
    block: Any = array
    while block.base is not None:
        block = block.base
    start = array.ctypes.data - block.ctypes.data
    return bool((block[:start] == 0x5A).all() and (block[start + array.nbytes :] == 0x5A).all())


def _pointer(array: NDArray[Any] | None) -> ctypes.c_void_p | None:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def vector(array: NDArray[Any] | None, dtype: str | None = None) -> Vector:
    """A per-channel vector of the named element type."""
    return Vector(None, 0) if array is None else Vector(_pointer(array), DTYPES.index(dtype or array.dtype.name))


def _call(name: str, *arguments: Any) -> None:
    error = getattr(library(), f"hvd_syncbn_cuda_{name}")(*arguments)
    assert error == 0, library().hvd_syncbn_cuda_error(error)


def forward_moments(
    shape: Shape, x: NDArray[Any], mask: NDArray[np.uint8] | None, eps: float, needs_gradient: bool = False
) -> NDArray[np.int64]:
    """The closed forward packet."""
    packet = guarded(np.full(native.packet_size(shape.c), -1, np.int64))
    arguments = (_pointer(x), _pointer(mask), ctypes.c_double(eps), ctypes.c_int32(needs_gradient), _pointer(packet))
    _call("forward_moments", ctypes.byref(shape), *arguments, None)
    assert intact(packet)
    return packet


def forward_apply(
    shape: Shape,
    eps: float,
    x: NDArray[Any],
    residual: NDArray[Any] | None,
    relu: bool,
    packet: NDArray[np.int64],
    vectors: tuple[Vector, ...],
    weights: tuple[float, float],
    unbiased: bool,
    layer: str,
    y: NDArray[Any],
    stream: ctypes.c_void_p | None = None,
) -> NDArray[np.float64]:
    """Fills ``y`` and returns the stats; ``vectors``: gamma, beta, the running statistics before and after."""
    stats = guarded(np.full((2, shape.c), 7.0))
    _call(
        "forward_apply",
        ctypes.byref(shape),
        ctypes.c_double(eps),
        _pointer(x),
        _pointer(residual),
        ctypes.c_int32(relu),
        _pointer(packet),
        *vectors,
        ctypes.c_double(weights[0]),
        ctypes.c_double(weights[1]),
        ctypes.c_int32(unbiased),
        layer.encode(),
        _pointer(stats),
        _pointer(y),
        stream,
    )
    assert intact(stats)
    return stats


def backward_moments(
    shape: Shape,
    x: NDArray[Any],
    dy: NDArray[Any],
    y: NDArray[Any] | None,
    mask: NDArray[np.uint8] | None,
    stats: NDArray[np.float64],
    dgamma: Vector,
    dbeta: Vector,
) -> NDArray[np.int64]:
    """The closed backward packet; fills dgamma and dbeta."""
    packet = guarded(np.full(native.packet_size(shape.c), -1, np.int64))
    _call(
        "backward_moments",
        ctypes.byref(shape),
        _pointer(x),
        _pointer(dy),
        _pointer(y),
        _pointer(mask),
        _pointer(stats),
        _pointer(packet),
        dgamma,
        dbeta,
        None,
    )
    assert intact(packet)
    return packet


def backward_apply(
    shape: Shape,
    x: NDArray[Any],
    dy: NDArray[Any],
    y: NDArray[Any] | None,
    mask: NDArray[np.uint8] | None,
    packet: NDArray[np.int64],
    stats: NDArray[np.float64],
    gamma: Vector,
    layer: str,
    dx: NDArray[Any],
    dresidual: NDArray[Any] | None,
) -> None:
    """Fills ``dx`` and ``dresidual``."""
    _call(
        "backward_apply",
        ctypes.byref(shape),
        _pointer(x),
        _pointer(dy),
        _pointer(y),
        _pointer(mask),
        _pointer(packet),
        _pointer(stats),
        gamma,
        layer.encode(),
        _pointer(dx),
        _pointer(dresidual),
        None,
    )


LAG = 32  # HVD_SYNCBN_CUDA_LAG
CAPTURING = ctypes.c_void_p(1)  # a stream that captures a graph


def failure() -> tuple[int, str]:
    """The oldest failure of an apply kernel that was not told: a status and a layer's name."""
    layer = ctypes.c_char_p()
    status = library().hvd_syncbn_cuda_failure(ctypes.byref(layer))
    return int(status), (layer.value or b"").decode()


def earlier_failure(stream: ctypes.c_void_p | None = None) -> tuple[int, str]:
    """What the apply kernel found wrong that is LAG launches before the next one."""
    layer = ctypes.c_char_p()
    status = library().hvd_syncbn_cuda_earlier_failure(stream, ctypes.byref(layer))
    return int(status), (layer.value or b"").decode()
