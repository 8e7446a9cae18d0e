"""Losses that differentiate a gradient; the reference is the definition, in elementary operations, on a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_syncbn.tensorflow import sync_batch_norm

EPSILON = 1e-3
# Both sides compute in float64; a sum over the ranks rounds differently.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def definition(x: Any, gamma: Any, beta: Any, name: str, mask: Any = None) -> Any:
    """Batch normalization by its definition, channels last."""
    counts = tf.ones_like(x) if mask is None else tf.cast(mask, x.dtype)[..., None] * tf.ones_like(x)
    axes = list(range(x.shape.rank - 1))
    n = tf.reduce_sum(counts, axes)
    centered = x - tf.reduce_sum(counts * x, axes) / n
    y = centered * tf.math.rsqrt(tf.reduce_sum(counts * centered**2, axes) / n + EPSILON)
    return y * gamma + beta


def synchronized(x: Any, gamma: Any, beta: Any, name: str, **options: Any) -> Any:
    """The layer, as `definition`."""
    ones = tf.ones(gamma.shape, gamma.dtype)
    return sync_batch_norm(x, gamma, beta, 0 * ones, ones, training=True, epsilon=EPSILON, name=name, **options)[0]


def parameters() -> list[Any]:
    """Of `network`."""
    rng = np.random.default_rng(1)
    shapes = [(4, 6), (6,), (6,), (6, 5), (5,), (5,), (5, 1)]
    return [tf.constant(rng.uniform(0.3, 1, shape)) for shape in shapes]


def network(x: Any, values: Sequence[Any], norm: Callable[..., Any]) -> Any:
    """Two norms, smooth activations."""
    x = tf.tanh(norm(x @ values[0], values[1], values[2], "second.first"))
    return tf.nn.softplus(norm(x @ values[3], values[4], values[5], "second.last")) @ values[6]


def _gradient(function: Callable[[Any], Any], x: Any) -> tuple[Any, Any]:
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = tf.reduce_sum(function(x))
    return value, tape.gradient(value, x)


def gradient_penalty(model: Callable[[Any], Any], x: Any) -> Any:
    """The critic's loss of WGAN-GP: the gradient's norm at every sample should be 1."""
    score, gradient = _gradient(model, x)
    return score + 10 * tf.reduce_sum((tf.norm(gradient, axis=1) - 1) ** 2)


def forces(model: Callable[[Any], Any], x: Any) -> Any:
    """A learned potential: forces are the negative gradient of the energy, and are compared with given ones."""
    return tf.reduce_sum((_gradient(model, x)[1] + tf.sin(tf.stop_gradient(x))) ** 2)


def curvature(model: Callable[[Any], Any], x: Any) -> Any:
    """A loss with second derivatives in it, whose gradient has third ones."""
    return tf.reduce_sum(_gradient(lambda x: _gradient(model, x)[1] ** 2, x)[1] ** 2)


LOSSES = {loss.__name__: loss for loss in (gradient_penalty, forces, curvature)}


def gradients(loss: str, norm: Callable[..., Any], x: Any) -> list[Any]:
    """The gradients of x and of the parameters."""
    values = parameters()
    with tf.GradientTape() as tape:
        tape.watch([x, *values])
        result = LOSSES[loss](lambda x: network(x, values, norm), x)
    found: list[Any] = tape.gradient(result, [x, *values], unconnected_gradients="zero")
    return found


def check(
    loss: str, mine: list[int], samples: int, add: Callable[[Any], Any], wrap: Callable[..., Any] = lambda function: function
) -> None:
    """Compare this rank's part of a batch, whose loss is the sum over the ranks, with the whole batch.

    Args:
        loss: of `LOSSES`.
        mine: this rank's samples of all.
        samples: of the whole batch.
        add: sums a tensor over the ranks.
        wrap: makes a graph of a function, or leaves it eager.
    """
    x = np.random.default_rng(3).standard_normal((samples, 4))
    got = wrap(lambda part: gradients(loss, synchronized, part))(tf.constant(x[mine]))
    want = gradients(loss, definition, tf.constant(x))
    np.testing.assert_allclose(got[0], want[0].numpy()[mine], **TOLERANCE)
    for mine_alone, whole in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(add(mine_alone), whole, **TOLERANCE)
