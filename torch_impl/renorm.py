"""Batch renormalization over the batch of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_syncbn import renorm
from hvd_syncbn.renorm import Clipping, Statistics
from hvd_syncbn.running import WITHOUT_STATISTICS, Running
from hvd_syncbn.torch_impl import ops, ranks
from hvd_syncbn.torch_impl.functional import check_built_for, rerun

_TORCH = renorm.Framework(torch.clamp, torch.where, torch.isfinite)


def renormalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    renorm_mean: Tensor,
    renorm_stddev: Tensor,
    bounds: Clipping,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    process_set: Any,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Normalize checked inputs over all ranks, and correct by the renorm statistics.

    Returns:
        The output and the reduced packet of the batch, by which the caller updates the layer's statistics.

    Raises:
        RuntimeError: the layer is inside a checkpoint or an ``autograd.Function``.
    """
    _check_runs_once(name)
    check_built_for(x)
    group = None if x.is_meta else ranks.key_of(process_set)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual))
    with torch.no_grad():
        packet = ops.reduced_packet(x, eps, group, name, needs_gradient)
        mean, invstd = _moments(packet, x.new_empty(0, x.shape[1]), eps, name, needs_gradient)
        r, d = renorm.correction(mean, invstd, renorm_mean.double(), renorm_stddev.double(), eps, bounds, _TORCH)
    scale, offset = renorm.compose(r, d, *(None if p is None else p.double() for p in (weight, bias)))
    relu = activation == "relu"
    y: Tensor = ops.sync_batch_norm(x, scale, offset, residual, *WITHOUT_STATISTICS, eps, relu, group, name, None, packet)
    return y, packet


def update_statistics(
    packet: Tensor, statistics: Statistics, running: Running, renorm_momentum: float, eps: float, name: str
) -> None:
    """Update a layer's statistics in place by the reduced packet of a batch."""
    mean, invstd = _moments(packet, torch.empty(0, statistics.mean.numel(), device=packet.device), eps, name, False)
    old = Statistics(*(tensor.double() for tensor in statistics))
    renorm_weights = 1 - renorm_momentum, renorm_momentum
    new = renorm.update(old, mean, invstd, packet, running, renorm_weights, eps, _TORCH)
    for tensor, value in zip(statistics, new, strict=True):
        tensor.copy_(value)


def _check_runs_once(name: str) -> None:
    if rerun() in (None, (None, True)) or torch.is_inference_mode_enabled():
        return
    raise RuntimeError(
        f"layer {name!r} does batch renormalization inside a checkpoint or an autograd.Function. If its code runs again in the "
        "backward pass, the renorm statistics have changed, and gradients would not be those of the output. "
        "Received: renorm=True. Leave the layer out of the checkpoint"
    )


def _moments(packet: Tensor, x: Tensor, eps: float, name: str, needs_gradient: bool) -> Tensor:
    """Return the mean and 1 / standard deviation of each channel, float64; x has no values."""
    stats: Tensor = ops.forward_apply(x, packet, None, None, None, *WITHOUT_STATISTICS, eps, False, name, needs_gradient)[1]
    return stats
