"""Synchronized batch normalization as a function of tensors: input checks, training, evaluation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hvd_syncbn.running import Running
from hvd_syncbn.torch_impl import ops, ranks

ACTIVATIONS = (None, "relu")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_input(x: Tensor, num_features: int | None, residual: Tensor | None, activation: str | None) -> Tensor | None:
    """Raises ``ValueError`` or ``TypeError`` for an unsupported input; returns the residual in x's dtype."""
    if x.dim() < 2:
        raise ValueError(f"expected an input of at least 2 dimensions. Received: shape {tuple(x.shape)}")
    if x.is_quantized:
        raise TypeError(
            "there is no int8 form of a synchronized batch norm: call hvd_syncbn.torch.revert_sync_batchnorm before fusing and "
            f"converting a model for quantization. Received: {x.dtype}"
        )
    if x.dtype not in _DTYPES:
        raise TypeError(f"expected a float32, float64, float16 or bfloat16 input. Received: {x.dtype}")
    shapes_are_known = not torch.jit.is_tracing()  # where they are part of the trace, PyTorch's operators look at them
    if shapes_are_known and num_features is not None and x.shape[1] != num_features:
        raise ValueError(
            f"expected an input of {num_features} channels (dimension 1). Received: {x.shape[1]}, shape {tuple(x.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected an activation of {ACTIVATIONS}. Received: {activation!r}")
    if residual is None:
        return None
    if shapes_are_known and residual.shape != x.shape:
        raise ValueError(f"expected a residual of the input's shape {tuple(x.shape)}. Received: {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"expected a residual of the input's dtype {x.dtype}. Received: {residual.dtype}")
        residual = residual.to(x.dtype)
    return residual


def check_built_for(x: Tensor) -> None:
    """Raises ``RuntimeError`` for a GPU tensor without CUDA kernels."""
    if x.is_cuda and not ops.HAS_CUDA:
        raise RuntimeError(
            f"hvd-syncbn was built without CUDA, and the input is on {x.device}: reinstall it where a CUDA compiler (nvcc) is "
            "found, with `pip install --no-build-isolation --no-deps`"
        )


def rerun() -> object:
    """Return an identifier of the running checkpoint or ``autograd.Function``, which may run its code again in backward."""
    if torch.compiler.is_compiling():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    checkpoint = hooks[0] if hooks and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint" else None
    return checkpoint, torch._C._is_fwd_grad_enabled()


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    process_set: Any,
    name: str,
    total: Tensor | None = None,
) -> Tensor:
    """Training-mode normalization over all ranks, for checked inputs.

    Running statistics and batches change in place; the batch's packet is added to ``total``, an int64 sum of packets.
    """
    check_built_for(x)
    y: Tensor = ops.sync_batch_norm(
        x,
        weight,
        bias,
        residual,
        *running,
        eps,
        activation == "relu",
        None if x.is_meta else ranks.key_of(process_set),  # shapes alone need no other rank
        name,
        total,
    )
    return y


def frozen_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Training with stored statistics, for checked inputs: one pass forward, and one backward unless a parameter learns.

    On devices for which hvd-syncbn is built it has the bytes of TensorFlow's. Elsewhere these are PyTorch's own kernels.
    """
    if not (x.is_cpu or x.is_meta or (x.is_cuda and ops.HAS_CUDA)):
        return local_batch_norm(x, running_mean, running_var, None, weight, bias, False, 0.0, eps, residual, activation)
    y: Tensor = ops.frozen_batch_norm(x, weight, bias, residual, running_mean, running_var, eps, activation == "relu")
    return y


def local_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """PyTorch's own batch norm, then the residual and the activation: evaluation, which has nothing to synchronise and has to
    export to wherever PyTorch models go. TorchScript compiles it."""
    if batches is not None:
        batches.add_(1)
    share = 0.0
    if momentum is not None:
        share = momentum
    elif batches is not None:
        share = 1.0 / float(batches)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, share, eps)
    if residual is not None:
        if not torch.jit.is_tracing() and residual.shape != y.shape:
            raise ValueError(f"expected a residual of the input's shape {y.shape}. Received: {residual.shape}")
        y = y + residual
    return y if activation is None else F.relu(y)


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
    skip_nonfinite: bool = True,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` over the batch of all ranks.

    Args:
        x: ``(N, C, ...)``, float32, float64, float16 or bfloat16, contiguous or channels last (other strides are copied).
        running_mean, running_var: ``(C,)``, changed in place when training; None keeps none. Evaluation needs them.
        weight, bias: ``(C,)`` or None.
        training: False normalizes by the running statistics, in PyTorch's own kernels and without Horovod.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        residual: shaped as x, added before the activation.
        activation: None or ``"relu"``.
        process_set: the ranks that share the batch: a ``horovod.ProcessSet``, a ``torch.distributed.ProcessGroup`` or a 1-D
            ``DeviceMesh``. None is all ranks of Horovod if it is initialized, else those of torch.distributed.
        name: names the collective, the same on every rank.
        skip_nonfinite: whether a channel that is NaN or infinite in a batch, on any rank, keeps its running statistics; False
            makes them NaN, as in PyTorch.

    Returns:
        The output, shaped and laid out as x. Equal in every bit for any number of ranks and any split of the batch.

    Raises:
        TypeError, ValueError: an unsupported input or option, on every rank. On a GPU, what only the packets of
            all ranks tell is raised by the next step there; see ``check_device_errors``.
        RuntimeError: training without an initialized Horovod or torch.distributed. Over torch.distributed: another rank failed.
        HorovodInternalError: over Horovod, another rank failed.
    """
    residual = check_input(x, None, residual, activation)
    expected = x.shape[1:2]
    for label, vector in (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var)):
        if vector is not None and vector.shape != expected:
            raise ValueError(
                f"expected a {label} of the input's {x.shape[1]} channels (dimension 1 of {tuple(x.shape)}). "
                f"Received: shape {tuple(vector.shape)}"
            )
    if not training:
        return local_batch_norm(x, running_mean, running_var, None, weight, bias, False, momentum, eps, residual, activation)
    running = Running(running_mean, running_var, None, 1 - momentum, momentum, True, skip_nonfinite)
    return normalize(x, weight, bias, running, eps, residual, activation, process_set, name or "sync_batch_norm")
