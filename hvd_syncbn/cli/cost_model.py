"""What synchronizing costs a training step: the model of docs/cost_model.md, for ``hvd-syncbn doctor`` and the benchmarks.

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
    """What an allreduce costs: seconds before it starts (Horovod's cycle and agreement), per message, and per byte."""

    wait: float
    alpha: float
    beta: float


def ring(ranks: int, size: float, link: Link) -> float:
    """Seconds of one ring allreduce of ``size`` bytes."""
    return link.wait + 2 * (ranks - 1) * (link.alpha + size / ranks * link.beta) if ranks > 1 else 0.0


def hierarchical(ranks: int, size: float, inside: Link, across: Link, per_node: int = PER_NODE) -> float:
    """Seconds where every node reduces its share for itself, equal shares go around the nodes, and nodes gather them."""
    per_node = min(per_node, ranks)
    return ring(per_node, size, inside) + ring(ranks // per_node, size / per_node, across)


def fit(points: Sequence[Point]) -> Link:
    """The link that fits measurements best, in relative error; none of its numbers is negative.

    On one number of ranks alone the wait and the messages cannot be told apart: all goes to the wait.
    """
    seconds = np.array([s for *_, s in points])
    terms = np.array([[1, 2 * (p - 1), 2 * (p - 1) / p * size] for p, size, _ in points]) / seconds[:, None]
    terms *= (scale := 1 / np.linalg.norm(terms, axis=0))  # alike in size, for the solver
    # The best of the least squares solutions over every choice of terms that may differ from 0.
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
    """Of one layer and direction."""
    return 8 * packet_size(channels)


def step(channels: Sequence[int], allreduce: Callable[[float], float]) -> float:
    """Seconds that the packets of a training step take, one after the other: two per layer. ``allreduce`` gives those of one
    from its bytes."""
    return 2 * sum(allreduce(packet_bytes(c)) for c in channels)
