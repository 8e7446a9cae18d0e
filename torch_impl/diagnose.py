"""``diagnose``: why evaluation is poor where training accuracy is high."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from hvd_syncbn import diagnosis, native, population
from hvd_syncbn.diagnosis import Diagnosis
from hvd_syncbn.population import Vector
from hvd_syncbn.torch_impl.freeze import is_frozen
from hvd_syncbn.torch_impl.module import SyncBatchNorm
from hvd_syncbn.torch_impl.ops import check_device_errors
from hvd_syncbn.torch_impl.recalibrate import _call, _gpus, _Network, _Ranks, _to_core, _undone

_ADVICE = diagnosis.Advice(
    broadcast="Broadcast the model: hvd.broadcast_parameters(model.state_dict(), root_rank=0).",
    convert="Call hvd_syncbn.torch.convert_sync_batchnorm(model).",
    recalibrate="Call hvd_syncbn.torch.recalibrate(model, batches).",
    rename="Convert the models in one call, or set layer.collective_name.",
    momentum=lambda weight: f"momentum={weight:.2g}",
)


def diagnose(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    process_set: Any = None,
    progress: bool = True,
) -> Diagnosis:
    """Compare a model's running statistics with those of data, and say what to do about poor evaluation.

    The statistics of the data are those that ``recalibrate(model, batches)`` would store: the means over the batches (of all
    ranks together), every layer normalizing each batch by its own statistics. Nothing of the model changes. Every rank must
    call it.

    Args:
        model: the model; layers are observed that ``forward`` reaches.
        batches: this rank's batches, as in ``recalibrate``; batches of the training data tell whether the statistics are
            right. None only reports what shows without data: which layers are local, frozen or named alike, the numbers of
            updates, NaN, ranks that differ.
        forward: called as ``forward(model, batch)`` in place of the model.
        process_set: the ranks that share the data; None is all of them.
        progress: whether the first rank shows a progress bar where it takes more than a second.

    Returns:
        A ``Diagnosis``, the same on every rank: ``print`` it, or use its ``layers``, ``advice`` and ``plot()``.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``, or ``batches`` is not an iterable of batches.
        ValueError: no rank has a batch, one value per channel, ranks with different models; on every rank.
        RuntimeError: neither Horovod nor torch.distributed is initialized; another rank failed.

    Example:
        >>> import horovod.torch as hvd, torch
        >>> from torch import nn
        >>> from hvd_syncbn.torch import SyncBatchNorm, diagnose
        >>> hvd.init()
        >>> found = diagnose(nn.Sequential(SyncBatchNorm(2)), [torch.randn(8, 2) + 5])
        >>> found.layers[0].is_off, found.layers[0].initial_weight
        (True, 1.0)
    """

    def facts() -> list[diagnosis.Facts]:
        for device in _gpus(model):  # they know of NaN that was not reported yet
            torch.cuda.synchronize(device)
            check_device_errors(device)
        return [_facts(name, module) for name, module in norms.items()]

    def statistics() -> list[list[Vector]]:
        return [
            [_to_core(tensor.detach()) for tensor in (module.running_mean, module.running_var) if tensor is not None]
            for module in norms.values()
        ]

    def prepare() -> population.Network:
        population.check_arguments(batches, None, forward, False, False, (Tensor,))
        network = _Network(model, forward or _call, False)
        undo.enter_context(_undone(model, network.modules))
        return network

    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module. Received: {type(model).__name__}")
    norms = {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, _LazyNormBase)
    }
    with contextlib.ExitStack() as undo, torch.random.fork_rng(_gpus(model)), torch.no_grad():
        ranks = _Ranks(process_set)
        return diagnosis.diagnose(ranks, facts, prepare, statistics, batches, progress, _ADVICE)


def _facts(name: str, module: _BatchNorm) -> diagnosis.Facts:
    synchronized = isinstance(module, SyncBatchNorm)
    kind = diagnosis.FROZEN if is_frozen(module) else diagnosis.SYNCHRONIZED if synchronized else diagnosis.LOCAL
    collective = module.collective_name if isinstance(module, SyncBatchNorm) else None
    counted = module.num_batches_tracked
    averages = module.momentum is None or getattr(module, "zero_debias", False)
    return diagnosis.Facts(
        name,
        kind,
        collective,
        None if counted is None else int(counted),
        None if averages else module.momentum,
        0 if collective is None else native.nonfinite_batches(collective),
    )
