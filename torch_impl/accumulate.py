"""``accumulate_statistics``: running statistics over several micro-batches together."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from hvd_syncbn.torch_impl.module import SyncBatchNorm
from hvd_syncbn.torch_impl.user_code import Names

Module = TypeVar("Module", bound=nn.Module)


def accumulate_statistics(model: Module, batches: int) -> Module:
    """Makes each synchronized layer update its running statistics once in ``batches`` training steps, by all of them together.

    For gradient accumulation: with ``batches`` micro-batches per optimizer step (``backward_passes_per_step``,
    ``accumulate_grad_batches``) the running statistics of a layer have the same bytes as if its inputs had come in one batch,
    and momentum means what it means without accumulation. ``num_batches_tracked`` counts updates. Each micro-batch is still
    normalized by its own statistics (of all ranks).

    A layer counts its own training steps, so a layer that runs several times per micro-batch, or that a checkpoint runs again,
    completes an update sooner. Calling this function discards the micro-batches since a layer's last update, and a
    ``state_dict`` does not contain them. Call it after the model is on its device, and in an elastic job after every reset, on
    every rank.

    Args:
        model: changed in place. Each of its ``SyncBatchNorm`` layers with running statistics takes part.
        batches: the number of micro-batches per update, the same on every rank; 1 updates in every step again. Times the
            number of ranks it may be up to ``2 ** 22``.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``, or ``batches`` is not an int.
        ValueError: ``batches`` is less than 1.

    Warns:
        UserWarning: there is no such layer, or the class of a layer calls ``F.batch_norm`` itself and keeps updating in every
            step.

    Example:
        >>> import horovod.torch as hvd, torch
        >>> from hvd_syncbn.torch import SyncBatchNorm, accumulate_statistics
        >>> hvd.init()
        >>> layer = accumulate_statistics(SyncBatchNorm(1, momentum=1.0), 2)
        >>> for micro_batch in torch.tensor([[[1.0], [2.0]], [[3.0], [6.0]]]):
        ...     y = layer(micro_batch)
        >>> layer.running_mean, layer.num_batches_tracked
        (tensor([3.]), tensor(1))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module. Received: {type(model).__name__}")
    if not isinstance(batches, int) or isinstance(batches, bool):
        raise TypeError(f"expected an int for batches. Received: {batches!r}")
    if batches < 1:
        raise ValueError(f"expected at least 1 micro-batch per update. Received: batches={batches}")
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, SyncBatchNorm)}
    if not layers:
        warnings.warn(f"found no SyncBatchNorm. Received: {type(model).__name__}", stacklevel=2)
    for path, layer in layers.items():
        if _calls_batch_norm(type(layer)):
            warnings.warn(
                f"layer {path!r} updates its running statistics in every step, because its class calls F.batch_norm itself. "
                f"Received: {type(layer).__name__}",
                stacklevel=2,
            )
        elif layer.running_mean is not None:
            layer._accumulate(batches)
    return model


def _calls_batch_norm(cls: type[SyncBatchNorm]) -> bool:
    return cls.forward is not SyncBatchNorm.forward and "batch_norm" in Names(cls, [cls.forward]).names
