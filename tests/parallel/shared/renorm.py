"""The steps of the tests of batch renormalization, the same in both frameworks; arrays are channels last."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS, SAMPLES, CHANNELS = 4, 12, 5
EPSILON, MOMENTUM, RENORM_MOMENTUM = 1e-3, 0.1, 0.2  # the weights of a batch
CLIPPING = {"rmax": 1.4, "rmin": 0.6, "dmax": 0.3}

Array = NDArray[np.float32]


def batch(step: int) -> tuple[Array, Array, Array]:
    """Return `(x, dy, residual)` of the global batch."""
    rng = np.random.default_rng(step)
    x, dy, residual = (rng.standard_normal((SAMPLES, 3, 2, CHANNELS)).astype(np.float32) for _ in range(3))
    return x * np.float32(1 + step) + np.float32(step / 2), dy, residual


def parameters() -> tuple[Array, Array]:
    """Return `(gamma, beta)`."""
    rng = np.random.default_rng(99)
    return rng.standard_normal(CHANNELS).astype(np.float32), rng.standard_normal(CHANNELS).astype(np.float32)


def digest(parts: Iterable[tuple[list[int], list[Array]]], statistics: Iterable[Any]) -> str:
    """Return the sha256 of all ranks' `(samples, [y, dx, ...])`, in the order of the global batch, and of the statistics."""
    parts = list(parts)
    data = hashlib.sha256()
    for i in range(len(parts[0][1])):
        shape = parts[0][1][i].shape[1:]
        whole = np.full((SAMPLES, *shape), np.nan, np.float32)
        for samples, arrays in parts:
            whole[samples] = arrays[i]
        assert not np.isnan(whole).any()
        data.update(whole.tobytes())
    for vector in statistics:
        assert np.asarray(vector).dtype == np.float32
        data.update(np.ascontiguousarray(vector).tobytes())
    return data.hexdigest()
