"""Test data: arrays of every element type, hostile values, and the bytes that results are compared by."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

NUMPY = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def storage(values: NDArray[np.float64], dtype: str, layout: str = "channels_first") -> NDArray[Any]:
    """Logical ``[n, c, s]`` values of ``dtype`` as the contiguous array that the core takes (16-bit floats as bits)."""
    array = values.astype(NUMPY[dtype])
    if layout == "channels_last":
        array = array.transpose(0, 2, 1)
    array = np.ascontiguousarray(array)
    return array.view(np.uint16) if array.itemsize == 2 else array


def logical(array: NDArray[Any], dtype: str, layout: str = "channels_first") -> NDArray[np.float64]:
    """The inverse of ``storage``: float64 ``[n, c, s]``."""
    values = array.view(NUMPY[dtype]).astype(np.float64)
    return values.transpose(0, 2, 1) if layout == "channels_last" else values


def rounded(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Values that ``dtype`` can hold."""
    with np.errstate(over="ignore"):
        return values.astype(NUMPY[dtype]).astype(np.float64)


def hostile(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, nonfinite: bool = True) -> NDArray[np.float64]:
    """Normal values, huge and tiny ones, denormals, exact cancellations, zeros of both signs, and perhaps NaN and infinity."""
    info = ml_dtypes.finfo(NUMPY[dtype])
    size = int(np.prod(shape))
    values = rng.standard_normal(size)
    kind = rng.integers(0, 12, size)
    # Squares have to stay in range, or whole channels become NaN and hide the rest.
    top = min(float(info.maxexp), 70.0)
    low = max(float(info.minexp), -400.0)
    with np.errstate(over="ignore"):
        values = np.where(kind == 0, values * 2.0 ** rng.uniform(0, top - 3, size), values)
        values = np.where(kind == 1, values * 2.0 ** rng.uniform(low, 0, size), values)
        values = np.where(kind == 2, float(info.smallest_subnormal) * rng.integers(-9, 10, size), values)
        values = np.where(kind == 3, 0.0, values)
        values = np.where(kind == 4, -0.0, values)
        values = np.where(kind == 5, -np.roll(values, 1), values)
    result = rounded(values, dtype).reshape(shape)
    if nonfinite and size:
        spots = rng.integers(0, size, 2)
        result.reshape(-1)[spots] = rng.choice([np.nan, np.inf, -np.inf], 2)
    return result


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays are equal in shape, type and every byte."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
