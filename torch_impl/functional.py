"""Synchronized batch normalization as a function of tensors: input checks, the autograd function, evaluation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hvd_syncbn.torch_impl import ops

ACTIVATIONS = (None, "relu")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class _SyncBatchNorm(torch.autograd.Function):
    """One collective forward, one backward. Saved: x, the per-channel float64 stats, and with relu the output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weights: tuple[float, float] | Tensor,
        unbiased: bool,
        eps: float,
        relu: bool,
        process_set: int,
        name: str,
    ) -> Tensor:
        packet = ops.forward_moments(x, eps)
        ops.allreduce_(packet, f"hvd_syncbn.{name}.forward", process_set)
        tensors = x, packet, weight, bias, residual, running_mean, running_var
        if isinstance(weights, Tensor):
            y, stats = ops.forward_apply_average(*tensors, weights, unbiased, eps, relu, name)
        else:
            y, stats = ops.forward_apply(*tensors, *weights, unbiased, eps, relu, name)
        ctx.save_for_backward(x, weight, stats, y if relu else None)
        ctx.eps, ctx.process_set, ctx.name = eps, process_set, name
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, stats, y = ctx.saved_tensors
        want_x, want_weight, want_bias, want_residual = ctx.needs_input_grad[:4]
        # Of the masked dy; without an activation the residual's gradient is dy itself.
        masks_residual = want_residual and y is not None
        parameter_dtype = torch.float32 if weight is None else weight.dtype
        packet, dweight, dbias = ops.backward_moments(x, dy, y, stats, ctx.eps, parameter_dtype)
        dx = dresidual = None
        if want_x or masks_residual:
            ops.allreduce_(packet, f"hvd_syncbn.{ctx.name}.backward", ctx.process_set)
            dx, dresidual = ops.backward_apply(x, dy, y, packet, stats, weight, ctx.eps, masks_residual, ctx.name)
        if want_residual and not masks_residual:
            dresidual = dy
        return (
            dx if want_x else None,
            dweight if want_weight else None,
            dbias.to(ctx.bias_dtype) if want_bias else None,
            dresidual if want_residual else None,
            *(None,) * 8,
        )


def check_input(x: Tensor, num_features: int | None, residual: Tensor | None, activation: str | None) -> Tensor | None:
    """Raises ``ValueError`` or ``TypeError`` for what no rank could normalise; returns the residual in x's dtype."""
    if x.dim() < 2:
        raise ValueError(f"expected an input of at least 2 dimensions. Received: shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"expected a float32, float64, float16 or bfloat16 input. Received: {x.dtype}")
    if num_features is not None and x.shape[1] != num_features:
        raise ValueError(
            f"expected an input of {num_features} channels (dimension 1). Received: {x.shape[1]}, shape {tuple(x.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected an activation of {ACTIVATIONS}. Received: {activation!r}")
    if residual is None:
        return None
    if residual.shape != x.shape:
        raise ValueError(f"expected a residual of the input's shape {tuple(x.shape)}. Received: {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"expected a residual of the input's dtype {x.dtype}. Received: {residual.dtype}")
        residual = residual.to(x.dtype)
    return residual


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weights: tuple[float, float] | Tensor,
    unbiased: bool,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    process_set: Any,
    name: str,
) -> Tensor:
    """Training-mode normalization over all ranks, for checked inputs.

    Args:
        weights: of the old running statistic and of the batch's, before they are rounded to float32: ``(1 - momentum,
            momentum)`` as PyTorch spells momentum, the other way round as Keras does. Or, for the average over all batches,
            the number of batches before this one.
        unbiased: whether the running variance takes ``var * n / (n - 1)`` (PyTorch) or ``var`` (Keras).
    """
    if x.is_cuda and not ops.HAS_CUDA:
        raise RuntimeError(
            f"hvd-syncbn was built without CUDA, and the input is on {x.device}: reinstall it where a CUDA compiler (nvcc) is "
            "found, with `pip install --no-build-isolation --no-deps`"
        )
    return _SyncBatchNorm.apply(
        x,
        weight,
        bias,
        # torch.compile does not take one tensor in two places of an autograd function.
        residual.view_as(residual) if residual is x else residual,
        running_mean,
        running_var,
        weights,
        unbiased,
        float(eps),
        activation == "relu",
        ops.process_set_id(process_set),
        name,
    )


def local_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """PyTorch's own batch norm, then the residual and the activation: evaluation, which has nothing to synchronise and has to
    export to wherever PyTorch models go."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return F.relu(y) if activation == "relu" else y


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    process_set: Any = None,
    name: str | None = None,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` over the batch of all Horovod ranks.

    Args:
        x: ``(N, C, ...)``, float32, float64, float16 or bfloat16, contiguous or channels last (other strides are copied).
        running_mean, running_var: ``(C,)``, changed in place when training; None keeps none. Evaluation needs them.
        weight, bias: ``(C,)`` or None.
        training: False normalises by the running statistics, in PyTorch's own kernels and without Horovod.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        residual: shaped as x, added before the activation.
        activation: None or ``"relu"``.
        process_set: ``horovod.ProcessSet`` of the ranks that share the batch; None is all of them.
        name: names the collective, the same on every rank.

    Returns:
        The output, shaped and laid out as x. Equal in every bit for any number of ranks and any split of the batch.

    Raises:
        TypeError, ValueError: what architecture.md's table of bad input says, on every rank. On a GPU, what only the packets of
            all ranks tell is raised by the next step there; see ``check_device_errors``.
        RuntimeError: training without an initialised Horovod, and differentiating twice.
        HorovodInternalError: another rank failed.
    """
    residual = check_input(x, None, residual, activation)
    for label, vector in (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var)):
        if vector is not None and vector.shape != x.shape[1:2]:
            raise ValueError(
                f"expected a {label} of the input's {x.shape[1]} channels (dimension 1 of {tuple(x.shape)}). "
                f"Received: shape {tuple(vector.shape)}"
            )
    if not training:
        return local_batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps, residual, activation)
    return normalize(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        (1 - momentum, momentum),
        True,
        eps,
        residual,
        activation,
        process_set,
        name or "sync_batch_norm",
    )
