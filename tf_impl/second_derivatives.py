"""Second derivatives: the gradients of the ops that compute a gradient.

A gradient that another tape records has the bytes of the kernels. Its derivatives come from TensorFlow's own operations in
float64, with the sums allreduced; their bits depend on the split of the batch.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hvd_syncbn.tf_impl import ranks


@tf.RegisterGradient("HvdSyncbnBackwardMoments")
def _of_parameter_gradients(op: Any, _: Any, *gradients: Any) -> list[Any]:
    x, dy, stats, *optional = op.inputs
    ys, masks, unknowns = (op.get_attr(name) for name in ("ys", "masks", "unknowns"))
    with tf.GradientTape() as tape:
        tape.watch([x, dy])
        _, dgamma, dbeta, _ = _first_derivatives(op, x, dy, None, stats, optional[:ys], optional[ys:][:masks])
    dx, ddy = tape.gradient([dgamma, dbeta], [x, dy], [tf.cast(gradient, tf.float64) for gradient in gradients])
    return [dx, ddy, None, *[None] * (ys + masks + unknowns)]


@tf.RegisterGradient("HvdSyncbnBackwardApply")
def _of_input_gradients(op: Any, *gradients: Any) -> list[Any]:
    gammas = len(op.get_attr("gamma_types"))
    packets, ys, masks = (op.get_attr(name) for name in ("packets", "ys", "masks"))
    x, dy, *optional = op.inputs
    stats, *optional = optional[packets:]
    gamma, y, mask = optional[:gammas], optional[gammas:][:ys], optional[gammas + ys :]
    inputs = [x, dy, *gamma] if packets else [dy, *gamma]  # frozen, dx does not depend on x
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        dx, _, _, g = _first_derivatives(op, x if packets else None, dy, gamma, stats, y, mask)
    found = tape.gradient([dx, g][: len(gradients)], inputs, [tf.cast(gradient, tf.float64) for gradient in gradients])
    dx, ddy, *dgamma = found if packets else [None, *found]
    return [dx, ddy, *[None] * packets, None, *dgamma, *[None] * (ys + masks)]


def _first_derivatives(op: Any, x: Any, dy: Any, gamma: Any, stats: Any, y: list[Any], mask: list[Any]) -> tuple[Any, ...]:
    """Return `(dx, dgamma, dbeta, g)` as differentiable functions of `x`, `dy` and `gamma`; `g` is dy behind the activation.

    Args:
        op: its attributes are the layout, the layer and the group of ranks; without a group the statistics are constants.
        x: None for a frozen layer, where only `dgamma` needs it.
        gamma: a list of at most one tensor, as are `y` and `mask`; None if `dx` is not needed.
        stats: mean and 1 / standard deviation, float64.
        y: the output, if the activation is relu.
    """
    axis = 1 if tf.compat.as_str(op.get_attr("data_format")) == "channels_first" else dy.shape.rank - 1
    others = [i for i in range(dy.shape.rank) if i != axis]
    shape = [-1 if i == axis else 1 for i in range(dy.shape.rank)]
    layer, group = (tf.compat.as_str(op.get_attr(name)) for name in ("layer", "group"))

    def per_channel(vector: Any) -> Any:
        return tf.reshape(vector, shape)

    invstd = stats[1]
    g = tf.cast(dy, tf.float64)
    if y:
        g = tf.where(y[0] > 0, g, 0)
    dbeta = tf.reduce_sum(g, others)
    scale = tf.cast(gamma[0], tf.float64) if gamma else tf.ones_like(invstd)
    if x is None:
        return per_channel(scale * invstd) * g, None, dbeta, g
    centered = tf.cast(x, tf.float64) - per_channel(stats[0])
    counts = tf.ones_like(centered)
    if mask:
        counts *= tf.cast(tf.expand_dims(mask[0], axis), tf.float64)
    if group:
        first, second, n = tf.unstack(
            _sum_over_ranks(
                tf.stack([tf.reduce_sum(v, others) for v in (counts * centered, counts * centered**2, counts)]),
                group,
                f"{layer}.second.statistics",
            )
        )
        # Zero but for rounding, as the statistics that were subtracted are exact; what counts is its derivative.
        mean = first / n
        variance = second / n - mean**2
        centered -= per_channel(mean)
        invstd = tf.math.rsqrt(invstd**-2 + (variance - tf.stop_gradient(variance)))
    normalized = centered * per_channel(invstd)
    dgamma = tf.reduce_sum(g * normalized, others)
    if gamma is None or not group:
        return per_channel(scale * invstd) * g, dgamma, dbeta, g
    sums = _sum_over_ranks(tf.stack([dbeta, dgamma]), group, f"{layer}.second.gradients")
    dx = g - counts * (per_channel(sums[0]) + normalized * per_channel(sums[1])) / per_channel(n)
    return per_channel(scale * invstd) * dx, dgamma, dbeta, g


def _sum_over_ranks(values: Any, group: str, name: str) -> Any:
    """Return the sum of float64 values over the ranks, whose gradient is the sum of the ranks' gradients."""

    @tf.custom_gradient
    def summed(values: Any) -> Any:
        return ranks.known(group).sum(values, name), lambda gradient: _sum_over_ranks(gradient, group, f"{name}.gradient")

    return summed(values)
