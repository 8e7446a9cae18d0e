"""Calls the CUDA kernels on numpy arrays: emulated on the CPU, or on a GPU through its driver (tests/gpu/driver.py).

Each function is its C namesake in ``csrc/include/hvd_syncbn/cuda.h``; 16-bit floats are numpy ``uint16`` arrays of their bits.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hvd_syncbn import native
from hvd_syncbn.native import Shape
from hvd_syncbn.protocol import DTYPES
from tests import cuda_emulator


class Memory(Protocol):
    """A device's memory, and the library with its kernels."""

    def library(self) -> ctypes.CDLL:
        """The library."""

    def give(self, array: NDArray[Any], is_output: bool) -> int:
        """The address at which kernels find the array; an output's values need not be there."""

    def take_back(self) -> None:
        """Waits for the kernels, and copies to the host what was given."""


_memory: Memory = cuda_emulator.Memory()


def use(memory: Memory) -> Memory:
    """Call the kernels of this device from now on, and return the one before."""
    global _memory
    before, _memory = _memory, memory
    return before


class Output(NamedTuple):
    """An array that a kernel overwrites."""

    array: NDArray[Any]


class Vector(NamedTuple):
    """A per-channel vector; ``array`` None: absent."""

    array: NDArray[Any] | None
    dtype: int = 0


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


def vector(array: NDArray[Any] | None, dtype: str | None = None) -> Vector:
    """A per-channel vector of the named element type."""
    return Vector(None) if array is None else Vector(array, DTYPES.index(dtype or array.dtype.name))


def _given(argument: Any) -> Any:
    if isinstance(argument, Vector):
        data = None if argument.array is None else _memory.give(argument.array, False)
        return native.Vector(data, argument.dtype)
    if isinstance(argument, Output):
        return ctypes.c_void_p(_memory.give(argument.array, True))
    return ctypes.c_void_p(_memory.give(argument, False)) if isinstance(argument, np.ndarray) else argument


def _call(name: str, *arguments: Any) -> None:
    function = getattr(_memory.library(), f"hvd_syncbn_cuda_{name}")
    try:
        error = function(*map(_given, arguments))
        assert error == 0, _error(error)
    finally:
        _memory.take_back()


def _error(error: int) -> str:
    say = _memory.library().hvd_syncbn_cuda_error
    say.restype = ctypes.c_char_p
    return str(say(error).decode())


def forward_moments(
    shape: Shape, x: NDArray[Any], mask: NDArray[np.uint8] | None, eps: float, call: int = 0
) -> NDArray[np.int64]:
    """The closed forward packet."""
    packet = guarded(np.full(native.packet_size(shape.c), -1, np.int64))
    _call("forward_moments", ctypes.byref(shape), x, mask, ctypes.c_double(eps), ctypes.c_uint64(call), Output(packet), None)
    assert intact(packet)
    return packet


def forward_apply(
    shape: Shape,
    eps: float,
    x: NDArray[Any],
    residual: NDArray[Any] | None,
    relu: bool,
    packet: NDArray[np.int64] | None,
    vectors: tuple[Vector, ...],
    weights: tuple[float, float],
    unbiased: bool,
    skip_nonfinite: bool,
    layer: str,
    y: NDArray[Any],
    stream: ctypes.c_void_p | None = None,
) -> NDArray[np.float64]:
    """Fills ``y`` and returns the stats; ``vectors``: gamma, beta, running statistics before and after. No packet: frozen."""
    stats = guarded(np.full((2, shape.c), 7.0))
    gamma, beta, mean, var, *new = vectors
    _call(
        "forward_apply",
        ctypes.byref(shape),
        ctypes.c_double(eps),
        x,
        residual,
        ctypes.c_int32(relu),
        packet,
        gamma,
        beta,
        native.Running(_given(mean), _given(var), *weights, unbiased, skip_nonfinite),
        *new,
        layer.encode(),
        Output(stats),
        Output(y),
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
        x,
        dy,
        y,
        mask,
        stats,
        Output(packet),
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
    packet: NDArray[np.int64] | None,
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
        x,
        dy,
        y,
        mask,
        packet,
        stats,
        gamma,
        layer.encode(),
        Output(dx),
        None if dresidual is None else Output(dresidual),
        None,
    )


LAG = 32  # HVD_SYNCBN_CUDA_LAG
CAPTURING = ctypes.c_void_p(1)  # a stream that captures a graph


def failure() -> tuple[int, str]:
    """The oldest failure of an apply kernel that was not told: a status and a layer's name."""
    layer = ctypes.c_char_p()
    status = _memory.library().hvd_syncbn_cuda_failure(ctypes.byref(layer))
    return int(status), (layer.value or b"").decode()


def earlier_failure(stream: ctypes.c_void_p | None = None) -> tuple[int, str]:
    """What the apply kernel found wrong that is LAG launches before the next one."""
    layer = ctypes.c_char_p()
    status = _memory.library().hvd_syncbn_cuda_earlier_failure(stream, ctypes.byref(layer))
    return int(status), (layer.value or b"").decode()
