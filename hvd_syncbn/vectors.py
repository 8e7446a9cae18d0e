"""The stack of layers whose results must have the same sha256 in every framework and layout, for all rank counts and splits.

Five layers: x -> 0 -> 1 (relu) -> 2 (+ output of 0) -> 3 -> 4 (+ output of 2, relu), channels first here. A framework runs
the stack on its rank's samples; `digest` hashes the results of all ranks in the order of the global batch.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAMPLES, CHANNELS, HEIGHT, WIDTH = 12, 19, 7, 5
LAYERS = 5
EPS = 1e-5
MOMENTUM = 0.1  # in PyTorch's convention; 0.9 in Keras
RELU = (False, True, False, False, True)
RESIDUAL_OF = (None, None, 0, None, 2)  # the layer whose output is added

Array = NDArray[np.float32]


def _values(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs() -> tuple[Array, Array]:
    """Return `(x, dy)` of the global batch, [n, c, h, w]; channels differ in mean and scale."""
    shape = SAMPLES, CHANNELS, HEIGHT, WIDTH
    scale = np.float32(2.0) ** np.arange(-6, CHANNELS - 6, dtype=np.float32).reshape(1, -1, 1, 1)
    return (_values(1, *shape) + np.float32(3)) * scale, _values(2, *shape)


def parameters(layer: int) -> tuple[Array, Array]:
    """Return the layer's `(gamma, beta)`, shape [c] each."""
    return _values(10 + layer, CHANNELS), _values(20 + layer, CHANNELS)


def split(ranks: int, kind: str) -> list[list[int]]:
    """Return the samples of each rank.

    Args:
        ranks: number of ranks; with more than 12, some ranks have no samples.
        kind: "even", "uneven", "empty" (some ranks have no samples) or "shuffled".
    """
    counts = [len(range(rank, SAMPLES, ranks)) for rank in range(ranks)]
    if kind == "uneven":
        few = {1: [12], 2: [5, 7], 3: [1, 4, 7], 4: [2, 1, 6, 3]}
        cuts = np.sort(np.random.default_rng(ranks).integers(0, SAMPLES + 1, ranks - 1))
        counts = few.get(ranks) or np.diff(cuts, prepend=0, append=SAMPLES).tolist()
    elif kind == "empty":
        few = {1: [12], 2: [12, 0], 3: [0, 12, 0], 4: [3, 0, 9, 0]}
        counts = few.get(ranks) or [
            0 if rank % 2 else len(range(rank // 2, SAMPLES, (ranks + 1) // 2)) for rank in range(ranks)
        ]
    order = list(range(SAMPLES))
    if kind == "shuffled":
        order = np.random.default_rng(3).permutation(SAMPLES).tolist()
    edges = np.cumsum([0, *counts]).tolist()
    return [order[begin:end] for begin, end in itertools.pairwise(edges)]


SPLITS = ("even", "uneven", "empty", "shuffled")


def digest(y: Array, dx: Array, running: list[tuple[Any, Any]]) -> str:
    """Return the sha256 of the outputs and input gradients of the global batch, in its order, and of all running statistics."""
    data = hashlib.sha256()
    for array in (y, dx, *(a for pair in running for a in pair)):
        array = np.ascontiguousarray(array)
        assert array.dtype == np.float32
        data.update(array.tobytes())
    return data.hexdigest()
