"""The cost of synchronization in a training step: the model of docs/cost_model.md, for ``hvd-syncbn doctor`` and benchmarks.

A ring allreduce of B bytes over p ranks takes ``wait + 2 (p - 1) alpha + 2 (p - 1) / p B beta`` seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from hvd_syncbn.native import packet_size

PER_NODE = 8

Point = tuple[int, float, float]
"""Ranks, bytes, seconds of one measured allreduce."""


class Link(NamedTuple):
    """Seconds that an allreduce takes before it starts (Horovod's cycle and negotiation), per message, and per byte."""

    wait: float
    alpha: float
    beta: float


def ring(ranks: int, size: float, link: Link) -> float:
    """Return the seconds of one ring allreduce of ``size`` bytes."""
    return link.wait + 2 * (ranks - 1) * (link.alpha + size / ranks * link.beta) if ranks > 1 else 0.0


def hierarchical(ranks: int, size: float, inside: Link, across: Link, per_node: int = PER_NODE) -> float:
    """Return the seconds of reducing inside each node, then equal shares across nodes, then gathering inside each node."""
    per_node = min(per_node, ranks)
    return ring(per_node, size, inside) + ring(ranks // per_node, size / per_node, across)


def fit(points: Sequence[Point]) -> Link:
    """Return the link with non-negative numbers that fits measurements best, in relative error.

    Measurements on a single number of ranks cannot separate the wait from the messages; both then count as wait.
    """
    seconds = np.array([s for *_, s in points])
    terms = np.array([[1, 2 * (p - 1), 2 * (p - 1) / p * size] for p, size, _ in points]) / seconds[:, None]
    terms *= (scale := 1 / np.linalg.norm(terms, axis=0))  # of similar size, for the solver
    # Non-negative least squares: solve for every subset of the terms and keep the best solution.
    best, found = float("inf"), np.zeros(3)
    may = (0, 1, 2) if len({p for p, *_ in points}) > 1 else (0, 2)
    for count in range(1, len(may) + 1):
        for chosen in map(list, combinations(may, count)):
            part, _, rank, _ = np.linalg.lstsq(terms[:, chosen], np.ones(len(points)), rcond=1e-9)
            error = float(np.linalg.norm(terms[:, chosen] @ part - 1))
            if rank == count and (part >= 0).all() and error < best * (1 - 1e-9):
                best, found = error, np.zeros(3)
                found[chosen] = part
    return Link(*(found * scale).tolist())


def packet_bytes(channels: int) -> int:
    """Return the bytes of one packet of a layer with this number of channels."""
    return 8 * packet_size(channels)


def step(channels: Sequence[int], allreduce: Callable[[float], float]) -> float:
    """Return the seconds of all packets of a training step, two per layer, one after the other.

    Args:
        channels: number of channels of each layer.
        allreduce: returns the seconds of one allreduce from its bytes.
    """
    return 2 * sum(allreduce(packet_bytes(c)) for c in channels)
