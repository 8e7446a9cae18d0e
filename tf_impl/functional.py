"""``sync_batch_norm``: one training or evaluation step of the layer as a pure function, and its gradient.

Forward and backward are the same: local exact moments (an op) -> one allreduce -> finish and apply (an op). Evaluation is plain
TensorFlow, so an exported model needs neither Horovod nor the op library.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
from tensorflow.python.saved_model.save_context import in_save_context

from hvd_syncbn import native
from hvd_syncbn.running import Running
from hvd_syncbn.tf_impl import (
    ops,
    ranks,
    second_derivatives,  # noqa: F401, registers gradients
)

_FLOATS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
_ACTIVATIONS = (None, "relu")


def sync_batch_norm(
    x: Any,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    *,
    training: bool,
    momentum: float | None = 0.99,
    epsilon: float = 1e-3,
    axis: int = -1,
    mask: Any = None,
    residual: Any = None,
    activation: str | None = None,
    unbiased_variance: bool = False,
    zero_debias: bool = False,
    skip_nonfinite: bool = True,
    batches: Any = None,
    process_set: Any = None,
    name: str | None = None,
    total: Any = None,
    correction: Callable[[Any], tuple[Any, Any]] | None = None,
) -> tuple[Any, Any, Any]:
    """Batch normalization over the batch of all ranks together.

    In training the output, the input gradient and the new moving statistics have the same bits however the batch is dealt
    out to the ranks. It takes one Horovod allreduce forward and one backward, none where one rank is alone. The gradients of
    `gamma` and `beta` are this rank's part of the sum: `hvd.DistributedGradientTape` or
    `hvd_syncbn.keras.DistributedOptimizer` averages them with the other parameters' gradients.

    Gradients can be differentiated again, to any order. Inside a `tf.while_loop` set `parallel_iterations=1`: Horovod takes a
    name once at a time.

    Args:
        x: Tensor of at least 2 dims: float16, bfloat16, float32 or float64.
        gamma: Scale of each channel, or `None` for 1.
        beta: Offset of each channel, or `None` for 0.
        moving_mean: Moving mean of each channel. `gamma`, `beta` and the moving statistics have one dtype, which need not be
            that of `x`.
        moving_variance: Moving variance of each channel.
        training: Python boolean. `True` normalizes with the batch's statistics, `False` with the moving ones.
        momentum: Weight of the old moving statistics; the batch's weigh `1 - momentum`. `None` averages over all batches.
        epsilon: Small float added to the variance.
        axis: The channels' axis. The last one and 1 are read in place, any other costs transpositions.
        mask: Boolean tensor, broadcastable to `x` without its channels' axis. The statistics are taken over its true positions;
            all positions are normalized.
        residual: Tensor like `x` that is added before the activation.
        activation: `None` or `"relu"`.
        unbiased_variance: Whether the moving variance takes `n / (n - 1)` times the batch's variance, as PyTorch does.
        zero_debias: Whether the moving statistics are Caffe's average, in which what they started from has no weight: with
            `s = momentum * s + 1` in every batch, the batch weighs `1 / s`. Its variance is the unbiased one.
        skip_nonfinite: Whether a channel that is NaN or infinite in a batch, on any rank, keeps its moving statistics; `False`
            makes them NaN, as in Keras.
        batches: Number of batches before this one, an int64 scalar, which `zero_debias` and a momentum of `None` need. The
            caller counts.
        process_set: Horovod process set whose ranks share the batch; `None` for all.
        name: What error messages and Horovod's timeline call this layer; has to be the same on every rank.
        total: An int64 variable, a sum of packets, to which training adds the packet of the batch of all ranks; see
            `hvd_syncbn.keras.accumulate_statistics`.
        correction: For batch renormalization: a function of the reduced packet that returns the float64 scale and offset to use
            in training in place of `gamma` and `beta`. The moving statistics are then returned as they are.

    Returns:
        The tuple `(y, new_moving_mean, new_moving_variance)`. The caller assigns the moving statistics; in evaluation they
        are those that came in.

    Raises:
        TypeError: A dtype is not a floating one, or dtypes differ that have to be equal.
        ValueError: Arguments do not fit each other; the batch of all ranks holds one value per channel; the ranks disagree
            about the layer. In a `tf.function` the last two are `tf.errors.InvalidArgumentError` (or, where the channel
            counts differ, Horovod's `tf.errors.FailedPreconditionError`) when the graph runs.
        RuntimeError: Horovod is missing, was built without TensorFlow or is not initialized, in training.

    Reference:

    - [Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167).
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"`activation` has to be one of {_ACTIVATIONS}. Received: activation={activation!r}")
    x = tf.convert_to_tensor(x)
    axis = _checked_axis(x, axis)
    gamma, beta, moving_mean, moving_variance = _checked_parameters(x, axis, gamma, beta, moving_mean, moving_variance)
    if residual is not None:
        residual = tf.convert_to_tensor(residual)
        if residual.dtype != x.dtype:
            raise TypeError(f"`residual` has to have the dtype of x, {x.dtype.name}. Received: {residual.dtype.name}")
        if not residual.shape.is_compatible_with(x.shape):
            raise ValueError(f"`residual` has to have the shape of x, {x.shape}. Received: {residual.shape}")
    if mask is not None:
        mask = _checked_mask(x, axis, mask)

    averages = momentum is None or zero_debias
    if training and averages and batches is None:
        raise ValueError(
            "`batches` is needed to average without a bias. "
            f"Received: momentum={momentum}, zero_debias={zero_debias}, batches=None"
        )

    if not training:
        y = _evaluate(x, axis, gamma, beta, moving_mean, moving_variance, epsilon, residual, activation)
        return y, moving_mean, moving_variance

    x, data_format, to_last = _oriented(x, axis)
    residual = residual if residual is None or to_last is None else tf.transpose(residual, to_last)
    running = _running(moving_mean, moving_variance, momentum, unbiased_variance, zero_debias, skip_nonfinite, batches)
    layer, relu = name or "sync_batch_norm", activation == "relu"
    y, new_mean, new_variance = _train(
        x, gamma, beta, running, data_format, epsilon, mask, residual, relu, process_set, layer, total, correction
    )
    return _as_it_was(y, to_last), new_mean, new_variance


def forward_packet(x: Any, epsilon: float, axis: int, mask: Any = None) -> Any:
    """The packet of this rank's `x`, before the collective."""
    x = tf.convert_to_tensor(x)
    axis = _checked_axis(x, axis)
    mask = None if mask is None else _checked_mask(x, axis, mask)
    x, data_format, _ = _oriented(x, axis)
    common = {"data_format": data_format, "epsilon_bits": _float64_bits(epsilon)}
    with _clear_errors("forward_packet"):
        return ops.library().hvd_syncbn_forward_moments(x, _optional(mask), _unknown(), **common)


def normalize_by(
    packet: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    residual: Any,
    epsilon: float,
    axis: int,
    layer: str,
) -> Any:
    """`x` normalized by the statistics of a reduced packet, or by the moving ones if that is None, plus the residual."""
    axis = _checked_axis(x, axis)
    residual = None if residual is None else _oriented(tf.cast(residual, x.dtype), axis)[0]
    x, data_format, to_last = _oriented(tf.convert_to_tensor(x), axis)
    running = _unchanged(moving_mean, moving_variance)
    with _clear_errors(layer):
        y, *_ = _apply(x, packet, gamma, beta, running, residual, None, False, data_format, epsilon, layer)
    return _as_it_was(y, to_last)


def updated_statistics(
    packet: Any,
    moving_mean: Any,
    moving_variance: Any,
    *,
    momentum: float | None,
    unbiased_variance: bool,
    zero_debias: bool,
    skip_nonfinite: bool,
    batches: Any,
    epsilon: float,
    layer: str,
) -> tuple[Any, Any]:
    """The moving statistics after a training step whose reduced packet this is; arguments as those of `sync_batch_norm`."""
    mean, variance = tf.convert_to_tensor(moving_mean), tf.convert_to_tensor(moving_variance)
    running = _running(mean, variance, momentum, unbiased_variance, zero_debias, skip_nonfinite, batches)
    *_, new_mean, new_variance = _without_values(packet, running, tf.float32, epsilon, layer)
    return new_mean, new_variance


def moments(packet: Any, channels: int, dtype: Any, epsilon: float, layer: str) -> tuple[Any, Any]:
    """The mean and 1 / standard deviation of each channel in a reduced packet, float64; errors say the dtype of x."""
    unused = tf.zeros([channels], tf.float64)
    stats = _without_values(packet, _unchanged(unused, unused), dtype, epsilon, layer)[1]
    return stats[0], stats[1]


def _without_values(packet: Any, running: Running, dtype: Any, epsilon: float, layer: str) -> tuple[Any, Any, Any, Any]:
    """What a reduced packet gives to a rank that has no values of x."""
    x = tf.zeros([0, running.mean.shape[0]], dtype)
    with _clear_errors(layer):
        return _apply(x, packet, None, None, running, None, None, False, "channels_last", epsilon, layer)


def _running(
    moving_mean: Any,
    moving_variance: Any,
    momentum: float | None,
    unbiased_variance: bool,
    zero_debias: bool,
    skip_nonfinite: bool,
    batches: Any,
) -> Running:
    averages = momentum is None or zero_debias
    keep = 1.0 if momentum is None else momentum
    return Running(
        moving_mean,
        moving_variance,
        tf.convert_to_tensor(batches, tf.int64) if averages else None,
        keep,
        None if averages else 1.0 - keep,
        unbiased=unbiased_variance or zero_debias,
        skip_nonfinite=skip_nonfinite,
    )


def _oriented(x: Any, axis: int) -> tuple[Any, str, list[int] | None]:
    """x with its channels where the core takes them, the data format, and the permutation that it took."""
    last = x.shape.rank - 1
    if axis == last:
        return x, "channels_last", None
    if axis == 1:
        return x, "channels_first", None
    to_last = [i for i in range(last + 1) if i != axis] + [axis]
    return tf.transpose(x, to_last), "channels_last", to_last


def _as_it_was(y: Any, to_last: list[int] | None) -> Any:
    return y if to_last is None else tf.transpose(y, [to_last.index(i) for i in range(len(to_last))])


def frozen_batch_norm(
    x: Any,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    *,
    epsilon: float,
    axis: int = -1,
    residual: Any = None,
    activation: str | None = None,
    learns: bool = False,
    name: str | None = None,
) -> Any:
    """Training with moving statistics: one pass forward, and one backward unless `gamma` and `beta` learn.

    It has the bytes of PyTorch's. If XLA compiles it, if it is exported, or if there are GPUs and hvd-syncbn was built without
    CUDA, it is plain TensorFlow.

    Args:
        x, gamma, beta, moving_mean, moving_variance, epsilon, axis, residual, activation, name: As those of `sync_batch_norm`.
        learns: Whether `gamma` and `beta` have gradients.

    Returns:
        The output.
    """
    x = tf.convert_to_tensor(x)
    axis = _checked_axis(x, axis)
    gamma, beta, moving_mean, moving_variance = _checked_parameters(x, axis, gamma, beta, moving_mean, moving_variance)
    residual = None if residual is None else tf.convert_to_tensor(residual)
    without_kernel = tf.config.list_logical_devices("GPU") and not native.has_cuda()
    if without_kernel or _is_compiled_by_xla() or _is_exported():
        gamma, beta = (t if t is None or learns else tf.stop_gradient(t) for t in (gamma, beta))
        return _evaluate(x, axis, gamma, beta, moving_mean, moving_variance, epsilon, residual, activation)
    x, data_format, to_last = _oriented(x, axis)
    residual = residual if residual is None or to_last is None else tf.transpose(residual, to_last)
    running, relu = _unchanged(moving_mean, moving_variance), activation == "relu"
    y, *_ = _apply(x, None, gamma, beta, running, residual, None, relu, data_format, epsilon, name or "frozen", learns=learns)
    return _as_it_was(y, to_last)


def _checked_axis(x: Any, axis: int) -> int:
    if x.dtype not in _FLOATS:
        raise TypeError(f"x has to be float16, bfloat16, float32 or float64. Received: dtype={x.dtype.name}")
    if x.shape.rank is None or x.shape.rank < 2:
        raise ValueError(f"x has to have at least 2 dims, and a known number of them. Received: shape={x.shape}")
    if not -x.shape.rank <= axis < x.shape.rank:
        raise ValueError(f"`axis` has to be an axis of x. Received: axis={axis} for x of shape {x.shape}")
    return axis % x.shape.rank


def _checked_parameters(x: Any, axis: int, *parameters: Any) -> tuple[Any, ...]:
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    tensors = [None if parameter is None else tf.convert_to_tensor(parameter) for parameter in parameters]
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) > 1 or not dtypes <= set(_FLOATS):
        raise TypeError(
            "gamma, beta and the moving statistics have to have one floating dtype. "
            f"Received: {', '.join(sorted(dtype.name for dtype in dtypes))}"
        )
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None and name.startswith("moving"):
            raise ValueError(f"`{name}` is needed. Received: {name}=None")
        if tensor is not None and not tensor.shape.is_compatible_with([x.shape[axis]]):
            raise ValueError(
                f"`{name}` has to hold one value per channel. Received: {name} of shape {tensor.shape} "
                f"for x of shape {x.shape}, axis={axis}"
            )
    return tuple(tensors)


def _checked_mask(x: Any, axis: int, mask: Any) -> Any:
    mask = tf.cast(mask, tf.bool)
    if mask.shape.rank != x.shape.rank - 1:
        raise ValueError(
            "The mask provided should be one dimension less than the inputs. "
            f"Received: mask.shape={mask.shape}, inputs.shape={x.shape}"
        )
    positions = x.shape[:axis].concatenate(x.shape[axis + 1 :])
    try:
        tf.broadcast_static_shape(mask.shape, positions)
    except ValueError as error:
        raise ValueError(
            "A mask leaves out positions, not channels: it has to broadcast to the inputs' shape without the channels' axis, "
            f"{positions}. Received: mask.shape={mask.shape}, inputs.shape={x.shape}, axis={axis}"
        ) from error
    shape = tf.shape(x)
    return tf.broadcast_to(mask, tf.concat([shape[:axis], shape[axis + 1 :]], 0))


def _evaluate(
    x: Any,
    axis: int,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    epsilon: float,
    residual: Any,
    activation: str | None,
) -> Any:
    dtype = tf.float64 if x.dtype == tf.float64 else tf.float32
    shape = [-1 if i == axis else 1 for i in range(x.shape.rank)]
    mean, variance, offset, scale = (
        None if tensor is None else tf.reshape(tf.cast(tensor, dtype), shape)
        for tensor in (moving_mean, moving_variance, beta, gamma)
    )
    y = tf.nn.batch_normalization(tf.cast(x, dtype), mean, variance, offset, scale, epsilon)
    if residual is not None:
        y += tf.cast(residual, dtype)
    return tf.cast(tf.nn.relu(y) if activation == "relu" else y, x.dtype)


def _train(
    x: Any,
    gamma: Any,
    beta: Any,
    running: Running,
    data_format: str,
    epsilon: float,
    mask: Any,
    residual: Any,
    relu: bool,
    process_set: Any,
    layer: str,
    total: Any,
    correction: Callable[[Any], tuple[Any, Any]] | None,
) -> tuple[Any, Any, Any]:
    _refuse_xla_and_export(layer)
    group = ranks.find(process_set)
    common = {"data_format": data_format, "epsilon_bits": _float64_bits(epsilon), "name": _node_name(layer)}
    with _clear_errors(layer):
        packet = ops.library().hvd_syncbn_forward_moments(x, _optional(mask), _unknown(), **common)
        packet = group.sum(packet, f"{layer}.forward")
        used = running
        if correction is not None:
            gamma, beta = correction(packet)
            used = _unchanged(tf.zeros_like(gamma), tf.ones_like(gamma))
        y, _, new_mean, new_variance = _apply(
            x, packet, gamma, beta, used, residual, mask, relu, data_format, epsilon, layer, group=group.key
        )
        if correction is not None:
            new_mean, new_variance = running.mean, running.var
        if total is not None:
            total.assign_add(packet)
    return y, new_mean, new_variance


def _apply(
    x: Any,
    packet: Any,
    gamma: Any,
    beta: Any,
    running: Running,
    residual: Any,
    mask: Any,
    relu: bool,
    data_format: str,
    epsilon: float,
    layer: str,
    group: str = "",
    learns: bool = True,
) -> tuple[Any, Any, Any, Any]:
    """Normalize by a reduced packet, or by the running statistics if that is None."""
    results: tuple[Any, Any, Any, Any] = ops.library().hvd_syncbn_forward_apply(
        x,
        _optional(packet),
        running.mean,
        running.var,
        _optional(gamma),
        _optional(beta),
        _optional(residual),
        _optional(mask),
        _optional(running.batches),
        relu=relu,
        learns=learns,
        old_weight=running.old_weight,
        new_weight=running.new_weight or 0.0,
        unbiased_variance=running.unbiased,
        skip_nonfinite=running.skip_nonfinite,
        layer=layer,
        group=group,
        data_format=data_format,
        epsilon_bits=_float64_bits(epsilon),
        name=_node_name(layer),
    )
    return results


def _unchanged(moving_mean: Any, moving_variance: Any) -> Running:
    """The value for a call that leaves moving statistics unchanged."""
    return Running(moving_mean, moving_variance, None, 1.0, 0.0, unbiased=False)


@tf.RegisterGradient("HvdSyncbnForwardApply")
def _gradient(op: Any, dy: Any, *_: Any) -> list[Any]:
    """The layer's gradient: x reaches y through the packet, too, and this is both ways at once. A frozen layer has none."""
    kinds = ("packets", "gammas", "betas", "residuals", "masks", "counts")
    packets, gammas, betas, residuals, masks, counts = (op.get_attr(name) for name in kinds)
    x, *others = op.inputs
    moving_mean, optional = others[packets], others[packets + 2 :]
    gamma, mask = optional[:gammas], optional[gammas + betas + residuals :][:masks]
    y, stats = op.outputs[:2]
    relu = op.get_attr("relu")
    layer, group = (tf.compat.as_str(op.get_attr(name)) for name in ("layer", "group"))
    common = {"data_format": tf.compat.as_str(op.get_attr("data_format")), "name": _node_name(layer)}
    _refuse_xla_and_export(layer)
    packet = dgamma = dbeta = None
    with _clear_errors(layer):
        if op.get_attr("learns"):
            packet, dgamma, dbeta = ops.library().hvd_syncbn_backward_moments(
                x, dy, stats, [y] * relu, mask, _unknown(), U=moving_mean.dtype, layer=layer, group=group, **common
            )
        if packets:
            packet = ranks.known(group).sum(packet, f"{layer}.backward")
        dx, masked_dy = ops.library().hvd_syncbn_backward_apply(
            x if packets else dy,  # frozen, dx does not depend on x
            dy,
            [packet] * packets,
            stats,
            gamma,
            [y] * relu,
            mask,
            residuals=residuals * relu,
            layer=layer,
            group=group,
            **common,
        )
    dresidual = masked_dy if relu else [dy] * residuals
    none = [None] * (packets + 2)
    return [dx, *none, *[dgamma] * gammas, *[dbeta] * betas, *dresidual, *[None] * (masks + counts)]


def _refuse_xla_and_export(layer: str) -> None:
    """Raises where a function that trains is traced to be compiled by XLA or exported."""
    if _is_compiled_by_xla():
        raise RuntimeError(
            "XLA cannot compile synchronized batch normalization in training, nor its collectives. "
            f"Received: layer {layer!r} in a function with jit_compile=True. "
            "Pass jit_compile=False to `tf.function` or `compile()`."
        )
    if _is_exported():
        raise RuntimeError(
            "a SavedModel with synchronized batch normalization in training mode could be loaded only where hvd-syncbn is "
            f"installed. Received: layer {layer!r} in an exported function, with training=True. Export functions that call the "
            "model with training=False, and keep functions that train out of the exported object."
        )


def _is_compiled_by_xla() -> bool:
    return not tf.executing_eagerly() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _is_exported() -> bool:
    return not tf.executing_eagerly() and in_save_context()


def _node_name(layer: str) -> str:
    """An op's name. XLA's error says it where it meets the op in a function that was traced before: it holds the remedy."""
    return re.sub(r"[^\w.-]", "_", f"hvd_syncbn.{layer}.set_jit_compile_False", flags=re.ASCII)


def _optional(tensor: Any) -> list[Any]:
    return [] if tensor is None else [tensor]


def _unknown() -> list[Any]:
    """What keeps TensorFlow from folding an op of constants in a graph, or merging it with another: no random numbers."""
    if tf.executing_eagerly():
        return []
    return [tf.raw_ops.RandomUniformInt(shape=[0], minval=0, maxval=1, seed=1, seed2=1)]


def _float64_bits(value: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


@contextlib.contextmanager
def _clear_errors(layer: str) -> Iterator[None]:
    """Turns what eager ops raise into what Python code expects. A graph runs later and raises TensorFlow's own errors."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        text = re.sub(r"^\{\{.*?\}\} | \[Op:\w+\].*", "", error.message, flags=re.DOTALL)
        raise ValueError(text) from error
