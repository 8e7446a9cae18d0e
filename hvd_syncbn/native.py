"""Python bindings of the core's C interface on numpy arrays, for ``recalibrate``, tests, ``hvd-syncbn verify`` and ``doctor``.

Training steps do not use this module; the adapters link the same library. Each function calls the C function of its name in
``csrc/include/hvd_syncbn/core.h`` for all its units. 16-bit floats are numpy ``uint16`` arrays of their bits.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hvd_syncbn
from hvd_syncbn.protocol import DTYPES, HEADER, LIMBS

DIGEST = slice(2, HEADER)  # of a packet: what the ranks must agree on
LAYOUTS = ("channels_first", "channels_last")
CACHE_LINE = 64
OK, RANKS_DISAGREE, ONE_VALUE, EMPTY, CALLS_DIFFER, NONFINITE = range(6)
FORWARD, BACKWARD = range(2)
POOLED, BATCHES = range(2)

_STORAGE = {"float32": np.float32, "float64": np.float64, "float16": np.uint16, "bfloat16": np.uint16}


class Shape(ctypes.Structure):
    """The logical input ``x[n, c, s]`` of one rank: ``dtype`` and ``layout`` are codes."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("c", ctypes.c_int64),
        ("s", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("layout", ctypes.c_int32),
    )


class Vector(ctypes.Structure):
    """A per-channel vector; ``dtype`` is a code."""

    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int32))


class Running(ctypes.Structure):
    """Running statistics, and how a batch changes them."""

    _fields_ = (
        ("mean", Vector),
        ("var", Vector),
        ("old_weight", ctypes.c_double),
        ("new_weight", ctypes.c_double),
        ("unbiased", ctypes.c_int32),
        ("skip_nonfinite", ctypes.c_int32),
    )


def find(name: str) -> Path:
    """Return the path of a built file of the installed package.

    Raises:
        ImportError: it was not built.
    """
    # An editable install keeps the sources in the checkout and the built files in site-packages.
    folders = [*map(Path, hvd_syncbn.__path__), Path(sysconfig.get_path("platlib")) / "hvd_syncbn"]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise ImportError(
        f"hvd-syncbn was built without {name}. Run `make setup` in its checkout, or reinstall it with "
        "`pip install --no-build-isolation --no-deps` in an environment that has the framework. "
        f"Searched: {', '.join(map(str, folders))}."
    )


def adapter(name: str, framework: str, version: str) -> str:
    """Return the path of an adapter's library, built for this ``version`` of its framework.

    Raises:
        ImportError: it was not built, or was built for another version.
    """
    path = find(name)
    built_for = (path.parent / "built_for.txt").read_text()
    if built_for != version:
        raise ImportError(
            f"hvd-syncbn was built for {framework} {built_for}, and {version} is installed. Run `make setup` in its checkout, "
            "or reinstall it with `pip install --no-build-isolation --no-deps`."
        )
    return str(path)


def is_older(version: str, oldest: tuple[int, int]) -> bool:
    """Return whether a framework's version is older than ``oldest``, by its first two numbers."""
    return tuple(map(int, version.split(".")[:2])) < oldest


@cache
def library() -> ctypes.CDLL:
    """Load the core library.

    Raises:
        ImportError: the package was not built.
    """
    lib = ctypes.CDLL(str(find("libhvd_syncbn.so")))
    for name in ("coefficients_size", "moments_units", "apply_units", "count_nonfinite"):
        getattr(lib, f"hvd_syncbn_{name}").restype = ctypes.c_int64
    for name in ("isa", "isas"):
        getattr(lib, f"hvd_syncbn_{name}").restype = ctypes.c_char_p
    return lib


def has_cuda() -> bool:
    """Return whether the core was built with its CUDA kernels."""
    return hasattr(library(), "hvd_syncbn_cuda_forward_moments")


def packet_size(channels: int) -> int:
    """Return the number of int64 words in a packet of ``channels`` channels."""
    return HEADER + channels * (1 + 2 * LIMBS)


def nonfinite_batches(layer: str) -> int:
    """Return how many batches of a layer, by the name of its collectives, had channels that are not finite in this process."""
    return int(library().hvd_syncbn_count_nonfinite(layer.encode(), ctypes.c_int64(0)))


def isa() -> str:
    """Return the instruction-set path in use."""
    return str(library().hvd_syncbn_isa().decode())


def isas() -> list[str]:
    """Return all instruction-set paths that this machine can run."""
    return str(library().hvd_syncbn_isas().decode()).split(",")


def set_isa(name: str) -> None:
    """Switch this process to another instruction-set path.

    Raises:
        ValueError: this machine cannot run it.
    """
    if library().hvd_syncbn_set_isa(name.encode()) != 0:
        raise ValueError(f"expected an instruction-set path of this machine: {isas()}. Received: {name!r}")


def shape(n: int, c: int, s: int, dtype: str, layout: str = "channels_first") -> Shape:
    """Return a ``Shape`` from the names of a dtype and a layout."""
    return Shape(n, c, s, DTYPES.index(dtype), LAYOUTS.index(layout))


def _pointer(array: NDArray[Any] | None) -> ctypes.c_void_p | None:
    if array is None:
        return None
    if not array.flags.c_contiguous:
        raise ValueError(f"the core expects contiguous arrays. Received: shape {array.shape}, strides {array.strides}")
    return ctypes.c_void_p(array.ctypes.data)


def _vector(array: NDArray[Any] | None, dtype: str | None = None) -> Vector:
    if array is None:
        return Vector(None, 0)
    return Vector(_pointer(array), DTYPES.index(dtype or array.dtype.name))


def empty(shape: Shape) -> NDArray[Any]:
    """Return an uninitialized tensor that starts at a cache line, as the frameworks' tensors do."""
    sizes = (shape.n, shape.c, shape.s) if shape.layout == 0 else (shape.n, shape.s, shape.c)
    dtype = np.dtype(_STORAGE[DTYPES[shape.dtype]])
    size = math.prod(sizes) * dtype.itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(sizes)


def _ranges(units: int, splits: int) -> list[tuple[ctypes.c_int64, ctypes.c_int64]]:
    edges = [units * i // splits for i in range(splits + 1)]
    return [(ctypes.c_int64(b), ctypes.c_int64(e)) for b, e in itertools.pairwise(edges)]


def forward_packet(
    shape: Shape,
    x: NDArray[Any],
    eps: float,
    mask: NDArray[np.uint8] | None = None,
    splits: int = 1,
    call: int = 0,
) -> NDArray[np.int64]:
    """Return the closed forward packet of ``x``, computed in ``splits`` ranges of units."""
    packet = np.zeros(packet_size(shape.c), np.int64)
    ref = ctypes.byref(shape)
    for begin, end in _ranges(library().hvd_syncbn_moments_units(ref), splits):
        library().hvd_syncbn_forward_moments(ref, _pointer(x), _pointer(mask), begin, end, _pointer(packet))
    count = ctypes.c_int64(shape.n * shape.s if mask is None else int(np.count_nonzero(mask)))
    library().hvd_syncbn_forward_close(ref, ctypes.c_double(eps), ctypes.c_uint64(call), count, _pointer(packet))
    return packet


def backward_packet(
    shape: Shape,
    x: NDArray[Any],
    dy: NDArray[Any],
    stats: NDArray[np.float64],
    y: NDArray[Any] | None = None,
    count: int | None = None,
    splits: int = 1,
) -> NDArray[np.int64]:
    """Return the closed backward packet."""
    packet = np.zeros(packet_size(shape.c), np.int64)
    ref = ctypes.byref(shape)
    for begin, end in _ranges(library().hvd_syncbn_moments_units(ref), splits):
        library().hvd_syncbn_backward_moments(
            ref, _pointer(x), _pointer(dy), _pointer(y), _pointer(stats), begin, end, _pointer(packet)
        )
    count = shape.n * shape.s if count is None else count
    library().hvd_syncbn_backward_close(ref, _pointer(stats), ctypes.c_int64(count), _pointer(packet))
    return packet


def call_number(name: str, needs_gradient: bool) -> int:
    """Return the number of a call for ``forward_packet``."""
    function = library().hvd_syncbn_call_number
    function.restype = ctypes.c_uint64
    return int(function(name.encode(), ctypes.c_int32(needs_gradient)))


def check_packet(direction: int, packet: NDArray[np.int64]) -> int:
    """Return the status of a reduced packet of a direction: OK, RANKS_DISAGREE or CALLS_DIFFER, ONE_VALUE, or EMPTY."""
    return int(library().hvd_syncbn_check_packet(ctypes.c_int32(direction), _pointer(packet)))


def forward(
    shape: Shape,
    x: NDArray[Any],
    packet: NDArray[np.int64] | None,
    eps: float,
    gamma: NDArray[Any] | None = None,
    beta: NDArray[Any] | None = None,
    running_mean: NDArray[Any] | None = None,
    running_var: NDArray[Any] | None = None,
    weights: tuple[float, float] = (0.9, 0.1),
    unbiased: bool = True,
    residual: NDArray[Any] | None = None,
    relu: bool = False,
    splits: int = 1,
    skip_nonfinite: bool = True,
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return ``(y, stats)`` and update the running statistics in place. A None packet normalizes by these (a frozen layer)."""
    lib, ref = library(), ctypes.byref(shape)
    stats = np.empty((2, shape.c), np.float64)
    coefficients = np.empty(lib.hvd_syncbn_coefficients_size(ref), np.uint8)
    lib.hvd_syncbn_forward_finish(
        ref,
        ctypes.c_double(eps),
        _pointer(packet),
        _vector(gamma),
        _vector(beta),
        Running(_vector(running_mean), _vector(running_var), *weights, unbiased, skip_nonfinite),
        _pointer(stats),
        _pointer(coefficients),
    )
    y = empty(shape)
    for begin, end in _ranges(lib.hvd_syncbn_apply_units(ref), splits):
        lib.hvd_syncbn_forward_apply(
            ref, _pointer(x), _pointer(residual), ctypes.c_int32(relu), _pointer(coefficients), begin, end, _pointer(y)
        )
    return y, stats


def parameter_gradients(
    shape: Shape, packet: NDArray[np.int64], stats: NDArray[np.float64], dtype: str = "float32"
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return this rank's ``(dgamma, dbeta)`` from its own closed backward packet."""
    dgamma, dbeta = np.empty(shape.c, _STORAGE[dtype]), np.empty(shape.c, _STORAGE[dtype])
    library().hvd_syncbn_backward_params(
        ctypes.byref(shape), _pointer(packet), _pointer(stats), _vector(dgamma, dtype), _vector(dbeta, dtype)
    )
    return dgamma, dbeta


def backward(
    shape: Shape,
    x: NDArray[Any],
    dy: NDArray[Any],
    packet: NDArray[np.int64] | None,
    stats: NDArray[np.float64],
    gamma: NDArray[Any] | None = None,
    y: NDArray[Any] | None = None,
    mask: NDArray[np.uint8] | None = None,
    splits: int = 1,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return ``(dx, dresidual)`` from a reduced packet, or from None for a frozen layer."""
    lib, ref = library(), ctypes.byref(shape)
    coefficients = np.empty(lib.hvd_syncbn_coefficients_size(ref), np.uint8)
    lib.hvd_syncbn_backward_finish(ref, _pointer(packet), _pointer(stats), _vector(gamma), _pointer(coefficients))
    dx, dresidual = empty(shape), empty(shape)
    for begin, end in _ranges(lib.hvd_syncbn_apply_units(ref), splits):
        lib.hvd_syncbn_backward_apply(
            ref,
            _pointer(x),
            _pointer(dy),
            _pointer(y),
            _pointer(mask),
            _pointer(coefficients),
            begin,
            end,
            _pointer(dx),
            _pointer(dresidual),
        )
    return dx, dresidual


def add_packet(packet: NDArray[np.int64], total: NDArray[np.int64]) -> None:
    """Add a closed packet to a total of the same length, in place."""
    library().hvd_syncbn_add_packet(_channels(total), _pointer(packet), _pointer(total))


def add_batch(packet: NDArray[np.int64], total: NDArray[np.int64]) -> int:
    """Add the statistics of a reduced packet's batch to a total, in place, and return OK, ONE_VALUE or EMPTY."""
    return int(library().hvd_syncbn_add_batch(_channels(total), _pointer(packet), _pointer(total)))


def population(
    total: NDArray[np.int64], estimator: int, unbiased: bool, eps: float, *vectors: tuple[NDArray[Any], str] | None
) -> int:
    """Write population statistics into ``vectors`` and return OK, ONE_VALUE or EMPTY.

    The vectors are pairs of array and dtype: mean, variance and, to make the layer the identity, gamma and beta.
    """
    four = [_vector(*vector) if vector else _vector(None) for vector in (*vectors, None, None)[:4]]
    return int(
        library().hvd_syncbn_population(
            _channels(total), _pointer(total), ctypes.c_int32(estimator), ctypes.c_int32(unbiased), ctypes.c_double(eps), *four
        )
    )


def average_weights(old_weight: float, batches: int) -> tuple[float, float]:
    """Return the weights of the old running statistic and of the new batch's, after ``batches`` earlier batches."""
    old, new = ctypes.c_double(), ctypes.c_double()
    library().hvd_syncbn_average_weights(
        ctypes.c_double(old_weight), ctypes.c_int64(batches), ctypes.byref(old), ctypes.byref(new)
    )
    return old.value, new.value


def _channels(packet: NDArray[np.int64]) -> ctypes.c_int64:
    return ctypes.c_int64((len(packet) - HEADER) // (1 + 2 * LIMBS))
