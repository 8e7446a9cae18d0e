"""Batch renormalization (docs/protocol.md, 10): the formulas of both adapters, for vectors of any framework.

The vectors are float64 tensors of one value per channel. Only operators are used that are exactly rounded everywhere, so the
results have the same bits in every framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from hvd_syncbn.running import Running

_COUNT = 1  # the word of a packet that holds the number of values per channel


class Framework(NamedTuple):
    """The functions that are not operators: ``torch.clamp``, ``torch.where`` and ``torch.isfinite``, or their equals."""

    clip: Callable[[Any, float, float], Any]
    where: Callable[[Any, Any, Any], Any]
    is_finite: Callable[[Any], Any]


class Clipping(NamedTuple):
    """The bounds of ``r`` and ``d``."""

    rmin: float
    rmax: float
    dmax: float


class Statistics(NamedTuple):
    """What a layer with batch renormalization keeps: for evaluation, then for ``r`` and ``d``."""

    mean: Any
    variance: Any
    stddev: Any
    renorm_mean: Any
    renorm_stddev: Any


def bounds_of(bounds: Mapping[str, float] | None) -> Clipping:
    """Return the bounds in a layer's ``renorm_clipping``.

    Raises:
        ValueError: a key is unknown, ``rmax`` is less than ``rmin`` (0 if it is not given), or ``dmax`` is negative.

    Example:
        >>> bounds_of({"rmax": 3.0})
        Clipping(rmin=0.0, rmax=3.0, dmax=inf)
    """
    bounds = bounds or {}
    if set(bounds) - set(Clipping._fields):
        raise ValueError(f"expected the keys {', '.join(Clipping._fields)} in renorm_clipping. Received: {dict(bounds)}")
    found = Clipping(*(float(bounds.get(k, v)) for k, v in (("rmin", 0.0), ("rmax", math.inf), ("dmax", math.inf))))
    if not found.rmin <= found.rmax:
        raise ValueError(f"expected rmax to be at least rmin in renorm_clipping. Received: {dict(bounds)}")
    if not found.dmax >= 0:
        raise ValueError(f"expected dmax to be at least 0 in renorm_clipping. Received: {dict(bounds)}")
    return found


def correction(
    mean: Any, invstd: Any, renorm_mean: Any, renorm_stddev: Any, epsilon: float, bounds: Clipping, framework: Framework
) -> tuple[Any, Any]:
    """Return ``(r, d)`` for the ``mean`` and ``1 / stddev`` of a batch; the caller treats them as constants."""
    scale = framework.clip(renorm_stddev, math.sqrt(epsilon), math.inf)
    r = framework.clip(1.0 / invstd / scale, bounds.rmin, bounds.rmax)
    return r, framework.clip((mean - renorm_mean) / scale, -bounds.dmax, bounds.dmax)


def compose(r: Any, d: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
    """Return the scale and offset with which the layer computes ``(x * r + d) * gamma + beta``; gamma and beta may be None."""
    scale, offset = (r, d) if gamma is None else (gamma * r, gamma * d)
    return scale, offset if beta is None else offset + beta


def update(
    old: Statistics,
    mean: Any,
    invstd: Any,
    packet: Any,
    running: Running,
    renorm_weights: tuple[float, float],
    epsilon: float,
    framework: Framework,
) -> Statistics:
    """Return the statistics after a batch, in float64.

    Args:
        old: The statistics before.
        mean, invstd: Of the batch.
        packet: Of the batch, reduced. An empty batch changes nothing, nor do channels that ``running`` skips.
        running: The weights of ``mean``, ``variance`` and ``stddev``.
        renorm_weights: The weight of the old ``renorm_mean`` and ``renorm_stddev`` and that of the batch.
        epsilon: Added to the variance.
        framework: The framework's functions.
    """
    assert running.new_weight is not None
    counts = packet[_COUNT] > 0
    if running.skip_nonfinite:
        counts = framework.is_finite(mean) & counts
    stddev = 1.0 / invstd

    def moved(before: Any, batch: Any, weights: tuple[float, float]) -> Any:
        old_weight, new_weight = (float(np.float32(weight)) for weight in weights)
        return before * old_weight + batch * new_weight

    weights = running.old_weight, running.new_weight
    new_stddev = moved(old.stddev, stddev, weights)
    new = Statistics(
        moved(old.mean, mean, weights),
        framework.clip(new_stddev * new_stddev - epsilon, 0.0, math.inf),
        new_stddev,
        moved(old.renorm_mean, mean, renorm_weights),
        moved(old.renorm_stddev, stddev, renorm_weights),
    )
    return Statistics(*(framework.where(counts, *pair) for pair in zip(new, old, strict=True)))


def stddev_of(variance: Any, epsilon: float) -> Any:
    """Return the ``stddev`` that belongs to a stored variance, as a numpy array of the variance's dtype."""
    array = np.asarray(variance)
    return np.sqrt(array.astype(np.float64) + epsilon).astype(array.dtype)
