"""The operators ``torch.ops.hvd_syncbn.*``: loads the native ones, gives them shape functions, adds the collective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_syncbn import horovod, native

GLOBAL = 0  # Horovod's id of the set of all ranks
HAS_CUDA = native.has_cuda()

_process_sets: dict[int, Any] = {}


torch.ops.load_library(native.adapter("torch_impl/libhvd_syncbn_torch.so", "PyTorch", torch.__version__))
torch.library.define("hvd_syncbn::allreduce_", "(Tensor(a!) packet, str name, int process_set) -> ()")
torch.library.define(
    "hvd_syncbn::forward_apply_average",
    "(Tensor x, Tensor packet, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor batches, bool unbiased, float eps, bool relu, str name) -> (Tensor y, Tensor stats)",
)


def process_set_id(process_set: Any) -> int:
    """The id by which operators know a ``horovod.ProcessSet``; None is the set of all ranks."""
    number = horovod.process_set_id(process_set)
    if number != GLOBAL:
        _process_sets[number] = process_set
    return number


@torch.library.impl("hvd_syncbn::allreduce_", ["CPU", "CUDA"])
def _allreduce_(packet: Tensor, name: str, process_set: int) -> None:
    hvd = horovod.require("torch")
    ranks = None if process_set == GLOBAL else _process_sets[process_set]
    if horovod.size(hvd, ranks) == 1:
        return
    # A Horovod without CUDA copies GPU tensors to pinned memory and does not wait for the copy: here they are copied first.
    own = packet.cpu() if packet.is_cuda and not hvd.cuda_built() else packet
    try:
        hvd.allreduce_(own, name=name, op=hvd.Sum, process_set=ranks or hvd.global_process_set)
    except hvd.mpi_ops.HorovodInternalError as error:
        detail = horovod.mismatch(error)
        if detail is None:
            raise
        raise ValueError(horovod.disagreement(name, detail)) from error
    if own is not packet:
        packet.copy_(own)


def check_device_errors(device: torch.device | int | str | None = None) -> None:
    """Raises what the kernels on a GPU have found wrong since the last look, without waiting for the GPU.

    On a GPU the ranks' packets are checked by the kernels: outputs and gradients become NaN, and the next training step of any
    hvd-syncbn layer on that GPU raises the error. Call this (after ``torch.cuda.synchronize()`` to be sure) where no layer
    comes next: at the end of an epoch, or after replaying a CUDA graph.

    Args:
        device: the GPU; None is the current one.

    Raises:
        ValueError: the ranks disagreed about a layer, or their global batch held one value per channel.
    """
    if HAS_CUDA:
        torch.ops.hvd_syncbn.check_device_errors(torch.device("cuda" if device is None else device))


def batch_weight(batches: Tensor) -> float:
    """The weight of a batch in the average over it and the ``batches`` before it."""
    return 1.0 / (float(batches) + 1.0)


@torch.library.impl("hvd_syncbn::forward_apply_average", ["CPU", "CUDA"])
def _forward_apply_average(
    x: Tensor,
    packet: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    # An operator of its own: torch.compile would take a number that changes with every batch for a new program each time.
    new = batch_weight(batches)
    y, stats = forward_apply(x, packet, weight, bias, residual, running_mean, running_var, 1 - new, new, *options)
    return y, stats


def _like(x: Tensor) -> Tensor:
    """What the native operators return for an ``x``: channels last if x is so, else contiguous."""
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return torch.empty_like(x.movedim(1, -1)).movedim(-1, 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _packet(x: Tensor) -> Tensor:
    return x.new_empty(native.packet_size(x.shape[1]), dtype=torch.int64)


@torch.library.register_fake("hvd_syncbn::forward_moments")
def _forward_moments(x: Tensor, eps: float) -> Tensor:
    return _packet(x)


@torch.library.register_fake("hvd_syncbn::forward_apply_average")
@torch.library.register_fake("hvd_syncbn::forward_apply")
def _forward_apply(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty((2, x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("hvd_syncbn::backward_moments")
def _backward_moments(
    x: Tensor, dy: Tensor, y: Tensor | None, stats: Tensor, eps: float, parameter_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    vector = x.new_empty(x.shape[1], dtype=parameter_dtype)
    return _packet(x), vector, torch.empty_like(vector)


@torch.library.register_fake("hvd_syncbn::backward_apply")
def _backward_apply(
    x: Tensor,
    dy: Tensor,
    y: Tensor | None,
    packet: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    eps: float,
    want_residual: bool,
    name: str,
) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x) if want_residual else x.new_empty(0)


@torch.library.register_fake("hvd_syncbn::allreduce_")
def _fake_allreduce_(packet: Tensor, name: str, process_set: int) -> None:
    return None


forward_moments = torch.ops.hvd_syncbn.forward_moments
forward_apply = torch.ops.hvd_syncbn.forward_apply
forward_apply_average = torch.ops.hvd_syncbn.forward_apply_average
backward_moments = torch.ops.hvd_syncbn.backward_moments
backward_apply = torch.ops.hvd_syncbn.backward_apply
allreduce_ = torch.ops.hvd_syncbn.allreduce_
