"""Batch renormalization over the batch of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from hvd_syncbn import renorm
from hvd_syncbn.renorm import Clipping, Statistics
from hvd_syncbn.running import Running
from hvd_syncbn.tf_impl.functional import moments

_TENSORFLOW = renorm.Framework(tf.clip_by_value, tf.where, tf.math.is_finite)


def correction(
    gamma: Any, beta: Any, renorm_mean: Any, renorm_stddev: Any, bounds: Clipping, dtype: Any, epsilon: float, layer: str
) -> Callable[[Any], tuple[Any, Any]]:
    """Return the function that `sync_batch_norm` takes as `correction` for inputs of this dtype."""

    def corrected(packet: Any) -> tuple[Any, Any]:
        mean, invstd = moments(packet, renorm_mean.shape[0], dtype, epsilon, layer)
        old_mean, old_stddev = _float64(renorm_mean), _float64(renorm_stddev)
        r, d = map(tf.stop_gradient, renorm.correction(mean, invstd, old_mean, old_stddev, epsilon, bounds, _TENSORFLOW))
        return renorm.compose(r, d, *(None if vector is None else _float64(vector) for vector in (gamma, beta)))

    return corrected


def updated_statistics(
    packet: Any,
    statistics: Statistics,
    momentum: float,
    renorm_momentum: float,
    skip_nonfinite: bool,
    epsilon: float,
    layer: str,
) -> Statistics:
    """Return a layer's statistics after a training step with this reduced packet, in their dtypes."""
    mean, invstd = moments(packet, statistics.mean.shape[0], tf.float32, epsilon, layer)
    old = Statistics(*map(_float64, statistics))
    running = Running(None, None, None, momentum, 1.0 - momentum, unbiased=False, skip_nonfinite=skip_nonfinite)
    renorm_weights = renorm_momentum, 1.0 - renorm_momentum
    new = renorm.update(old, mean, invstd, packet, running, renorm_weights, epsilon, _TENSORFLOW)
    return Statistics(*(tf.cast(value, before.dtype) for value, before in zip(new, statistics, strict=True)))


def _float64(vector: Any) -> Any:
    return tf.cast(tf.convert_to_tensor(vector), tf.float64)
