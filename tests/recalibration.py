"""What the tests of `recalibrate` share in both frameworks: data, ways of dealing it out, a stack of layers, digests."""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_syncbn import protocol

SAMPLES, CHANNELS, HEIGHT, WIDTH = 24, 5, 4, 3
LAYERS = 4
RELU = (False, True, False, True)
RESIDUAL_OF = (None, None, 0, 1)  # the layer whose output is added
EPS = 1e-5
GLOBAL_BATCHES = (8, 6, 7, 3)
SPLITS = ("even", "uneven", "empty")

Array = NDArray[np.float32]


def values(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def images() -> Array:
    """[n, c, h, w], channels of different mean and scale."""
    scale = np.float32(4.0) ** np.arange(-2, CHANNELS - 2, dtype=np.float32).reshape(1, -1, 1, 1)
    return (values(1, SAMPLES, CHANNELS, HEIGHT, WIDTH) + np.float32(2)) * scale


def state(layer: int) -> tuple[Array, Array, Array, Array]:
    """`(gamma, beta, mean, variance)` before."""
    gamma, beta, mean, variance = (values(10 * layer + i, CHANNELS) for i in range(4))
    return gamma, beta, mean, variance**2 + np.float32(0.5)


def pooled_shards(ranks: int, kind: str) -> list[list[list[int]]]:
    """By rank, the samples of its batches."""
    if kind == "even":
        order = np.random.default_rng(ranks).permutation(SAMPLES).tolist()
        return [[order[r::ranks][i : i + 4] for i in range(0, SAMPLES // ranks, 4)] for r in range(ranks)]
    if kind == "uneven":
        edges = [0, *(3 + 5 * r for r in range(ranks - 1)), SAMPLES]
        return [_in_batches(list(range(begin, end)), 2 + rank) for rank, (begin, end) in enumerate(itertools.pairwise(edges))]
    shards: list[list[list[int]]] = [[] for _ in range(ranks)]  # the others have no batch at all
    shards[ranks // 2] = [list(range(10)), [], list(range(10, SAMPLES))]
    return shards


def batches_shards(ranks: int, kind: str) -> list[list[list[int]]]:
    """The same global batches, each dealt out to the ranks. A rank may have no part in the last ones: it ends early."""
    edges = [0, *itertools.accumulate(GLOBAL_BATCHES)]
    shards: list[list[list[int]]] = [[] for _ in range(ranks)]
    for number, (begin, end) in enumerate(itertools.pairwise(edges)):
        batch = list(range(begin, end))
        for rank in range(ranks):
            if kind == "even":
                part = batch[rank::ranks]
            elif kind == "uneven":
                cuts = [0, *(1 + r for r in range(ranks - 1)), len(batch)]
                part = batch[cuts[rank] : cuts[rank + 1]]
            else:
                part = batch if rank == ranks - 1 else []
            if part or (kind != "empty" and number == 0):
                shards[rank].append(part)
    if kind == "uneven" and ranks > 1:  # the first rank's samples of the last batches go to the last rank
        for number in (2, 3):
            shards[-1][number] = shards[0][number] + shards[-1][number]
        del shards[0][2:]
    return shards


WAYS: dict[str, tuple[dict[str, Any], Callable[[int, str], list[list[list[int]]]]]] = {
    "pooled": ({"estimator": "pooled"}, pooled_shards),
    "layer by layer": ({"layer_by_layer": True}, pooled_shards),
    "batches": ({}, batches_shards),
}
"""By name, the arguments of `recalibrate` and how the data is dealt out."""


def _in_batches(samples: list[int], size: int) -> list[list[int]]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def digest(statistics: Sequence[tuple[Any, Any]]) -> str:
    """sha256 of all layers' means and variances."""
    data = hashlib.sha256()
    for vector in itertools.chain(*statistics):
        array = np.ascontiguousarray(vector)
        assert array.dtype == np.float32 and array.shape == (CHANNELS,)
        data.update(array.tobytes())
    return data.hexdigest()


def flat(x: Array) -> NDArray[np.float64]:
    return x.reshape(*x.shape[:2], -1).astype(np.float64)


@functools.cache
def reference(estimator: str, passes: int = 1) -> list[tuple[Array, Array]]:
    """The stack's statistics by the pure-Python reference, in one process that has all the data."""
    x = flat(images())
    statistics = [state(layer)[2:] for layer in range(LAYERS)]
    edges = [0, *itertools.accumulate(GLOBAL_BATCHES)]
    for _ in range(passes):
        totals = [protocol.Packet(0, 0, (0, 0), *([0] * CHANNELS for _ in range(3))) for _ in range(LAYERS)]
        pooled = estimator == "pooled"
        for part in [x[b:e] for b, e in itertools.pairwise(edges)]:
            outputs: list[NDArray[np.float64]] = []
            for layer in range(LAYERS):
                inputs = outputs[-1] if outputs else part
                packet = protocol.forward_packet(inputs, EPS, "float32")
                totals[layer] = totals[layer] + packet if pooled else protocol.add_batch(totals[layer], packet)
                mean, variance = (vector.astype(np.float64).tolist() for vector in statistics[layer])
                by = protocol.stored_statistics(mean, variance, EPS) if pooled else protocol.finish_forward(packet, EPS)
                source = RESIDUAL_OF[layer]
                outputs.append(
                    protocol.apply_forward(
                        inputs,
                        by,
                        "float32",
                        *(vector.astype(np.float64).tolist() for vector in state(layer)[:2]),
                        residual=None if source is None else outputs[source],
                        relu=RELU[layer],
                    )
                )
        found = [protocol.pooled_population(t, True) if pooled else protocol.batches_population(t) for t in totals]
        statistics = [tuple(np.array(column, np.float32) for column in zip(*layer, strict=True)) for layer in found]
    return statistics


def total(packets: Sequence[protocol.Packet]) -> protocol.Packet:
    return functools.reduce(operator.add, packets)
