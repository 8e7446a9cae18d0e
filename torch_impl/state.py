"""Reading and writing the state of a layer: ``get_state``, ``set_state``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from hvd_syncbn.exchange import BatchNormState, Vector
from hvd_syncbn.torch_impl.module import SyncBatchNorm


def get_state(layer: nn.Module) -> BatchNormState:
    """Return the parameters, running statistics and options of a batch norm layer.

    Args:
        layer: ``SyncBatchNorm``, ``nn.BatchNorm1d``, ``2d``, ``3d`` or another ``_BatchNorm``, on any device.

    Returns:
        Its state, copied and rounded to float32, without the number of batches seen.

    Raises:
        TypeError: ``layer`` is not a batch norm layer.
        ValueError: ``layer`` has no running statistics, or no channel count yet.

    Example:
        >>> from torch import nn
        >>> from hvd_syncbn.torch import get_state
        >>> state = get_state(nn.BatchNorm2d(3))
        >>> state.variance, state.momentum, state.unbiased
        (array([1., 1., 1.], dtype=float32), 0.1, True)
    """
    norm = _checked(layer)
    mean, variance = _numpy(norm.running_mean), _numpy(norm.running_var)
    gamma, beta = (None if t is None else _numpy(t) for t in (norm.weight, norm.bias))
    return BatchNormState(gamma, beta, mean, variance, norm.eps, norm.momentum, unbiased=not _renormalizes(norm))


def set_state(layer: nn.Module, state: BatchNormState) -> None:
    """Set the parameters, running statistics, epsilon and momentum of a batch norm layer.

    Parameters and buffers are written in place. ``state.unbiased`` is ignored: further batches update the running variance with
    PyTorch's unbiased variance. The count of batches is kept; with ``momentum=None`` it is the weight of the statistics against
    the next batch.

    Args:
        layer: as in ``get_state``.
        state: from ``get_state`` of either framework, from ``from_caffe``, or constructed directly.

    Raises:
        TypeError: ``layer`` is not a batch norm layer, or ``state`` is not a ``BatchNormState``.
        ValueError: as ``get_state``; the number of channels differs; the state needs a gamma or beta that the layer does not
            have; the layer does batch renormalization. The layer is then unchanged.

    Example:
        >>> from torch import nn
        >>> from hvd_syncbn.exchange import from_caffe
        >>> from hvd_syncbn.torch import set_state
        >>> layer = nn.BatchNorm2d(2)
        >>> set_state(layer, from_caffe([2.0, 4.0], [8.0, 2.0], 2.0))
        >>> layer.running_mean, layer.momentum
        (tensor([1., 2.]), 0.001)
    """
    norm = _checked(layer)
    if not isinstance(state, BatchNormState):
        raise TypeError(f"expected a BatchNormState. Received: {type(state).__name__}")
    if _renormalizes(norm):
        raise ValueError(
            "a BatchNormState does not contain the state of batch renormalization: load a state_dict instead. "
            f"Received: the layer {norm}"
        )
    has = (norm.weight is not None, norm.bias is not None)
    gamma, beta = state.fitted(norm.running_mean.numel(), *has, f"the layer {norm}")
    values = {norm.weight: gamma, norm.bias: beta, norm.running_mean: state.mean, norm.running_var: state.variance}
    with torch.no_grad():
        for tensor, value in values.items():
            if tensor is not None:
                tensor.copy_(torch.tensor(value))
    norm.eps, norm.momentum = state.epsilon, state.momentum


def _renormalizes(norm: Any) -> bool:
    return isinstance(norm, SyncBatchNorm) and norm.renorm


def _numpy(tensor: Tensor) -> Vector:
    array: Vector = tensor.detach().cpu().float().numpy().copy()
    return array


def _checked(layer: object) -> Any:
    if not isinstance(layer, _BatchNorm):
        raise TypeError(f"expected a batch norm layer. Received: {type(layer).__name__}")
    if isinstance(layer, _LazyNormBase):
        raise ValueError(f"the lazy layer has no channel count yet. First run a batch through it. Received: {layer}")
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(f"the layer keeps no running statistics (track_running_stats=False). Received: {layer}")
    return layer
