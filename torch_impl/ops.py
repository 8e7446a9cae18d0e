"""The operators ``torch.ops.hvd_syncbn.*``: loads the native ones and adds the collective."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from hvd_syncbn import native
from hvd_syncbn.torch_impl import ranks

HAS_CUDA = native.has_cuda()

_OLDEST = (2, 11)  # that was tried and found right in everything: docs/versions.md


def warn_if_older(version: str) -> None:
    """Warns of a PyTorch in which a layer may be local without a word."""
    if native.is_older(version, _OLDEST):
        warnings.warn(
            f"hvd-syncbn is tried with PyTorch {'.'.join(map(str, _OLDEST))} and newer. In older ones (seen in 2.4) "
            "torch.compile takes its own batch norm for a converted layer that has a forward of its own: it is not "
            "synchronized there. "
            f"Received: {version}",
            stacklevel=2,
        )


warn_if_older(torch.__version__)
torch.ops.load_library(native.adapter("torch_impl/libhvd_syncbn_torch.so", "PyTorch", torch.__version__))
# The tag keeps it out of CUDA graphs that torch.compile records: Horovod's threads could not take part in a replay.
_TAGS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))  # from PyTorch 2.8 on
torch.library.define("hvd_syncbn::allreduce_", "(Tensor(a!) packet, str name, str group) -> ()", tags=_TAGS)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


torch.library.define("hvd_syncbn::warn", "(str message) -> ()")
torch.library.impl("hvd_syncbn::warn", "CompositeExplicitAutograd", _warn)


def _allreduce_(packet: Tensor, name: str, group: str) -> None:
    ranks.known(group).sum(packet, name)


torch.library.impl("hvd_syncbn::allreduce_", ["CPU", "CUDA"], _allreduce_)


def check_device_errors(device: torch.device | int | str | None = None) -> None:
    """Raises what the kernels on a GPU have found wrong and was not raised yet, without waiting for the GPU.

    On a GPU the ranks' packets are checked by the kernels: outputs and gradients become NaN at once, and the error is raised
    by a call of an hvd-syncbn layer on that GPU 32 calls later (forward and backward are one each), the same one on every
    rank. Call this (on every rank, after ``torch.cuda.synchronize()`` to be sure) to know sooner: at the end of an epoch, or
    after replaying a CUDA graph.

    Args:
        device: the GPU; None is the current one, if there is one.

    Raises:
        ValueError: the ranks disagreed about a layer, or their global batch held one value per channel.
        RuntimeError: ``device`` is a GPU that this process cannot use.
    """
    if not torch.cuda.is_available():
        if device is None:
            return
        raise RuntimeError(f"no GPU can be used here: no driver, or a PyTorch without CUDA. Received: device={device}")
    if HAS_CUDA:
        torch.ops.hvd_syncbn.check_device_errors(torch.device("cuda" if device is None else device))


@torch.library.register_fake("hvd_syncbn::allreduce_")
def _fake_allreduce_(packet: Tensor, name: str, group: str) -> None:
    return None


forward_moments = torch.ops.hvd_syncbn.forward_moments
forward_apply = torch.ops.hvd_syncbn.forward_apply
backward_moments = torch.ops.hvd_syncbn.backward_moments
backward_apply = torch.ops.hvd_syncbn.backward_apply
backward_check = torch.ops.hvd_syncbn.backward_check
allreduce_ = torch.ops.hvd_syncbn.allreduce_
reduced_packet = torch.ops.hvd_syncbn.reduced_packet
sync_batch_norm = torch.ops.hvd_syncbn.sync_batch_norm
frozen_apply = torch.ops.hvd_syncbn.frozen_apply
frozen_batch_norm = torch.ops.hvd_syncbn.frozen_batch_norm
