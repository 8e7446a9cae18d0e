"""Conversion of whole models to ``SyncBatchNorm`` and back.

A converted layer takes over the ``__dict__`` of the old one: parameters, buffers, hooks, training flag and device are not
copied but are the same objects, so optimizers and hook handles made before stay good.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from hvd_syncbn.torch_impl.module import BatchNorm, SyncBatchNorm

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNorm)
# What a SyncBatchNorm has beside a BatchNorm.
_OURS = ("process_set", "collective_name", "_converted_from")
_NAMES = {cls.__name__ for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, _BatchNorm)}


def _is_plain(cls: type) -> bool:
    return cls in _PLAIN or cls.__module__.startswith("horovod.")


@cache
def _synchronized(cls: type) -> type:
    """``SyncBatchNorm``, or for somebody's subclass a class in which its ``super().forward`` is ours."""
    if _is_plain(cls):
        return SyncBatchNorm

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (cls,), *object.__reduce_ex__(self, protocol)[2:]

    namespace = {"__reduce_ex__": reduce, "__doc__": cls.__doc__, "_fused": None}
    return type(f"Sync{cls.__name__}", (cls, SyncBatchNorm), namespace)


def _rebuild(cls: type) -> nn.Module:
    """An empty instance for pickle and deepcopy: the class made for a subclass has no name to import it by."""
    return _blank(_synchronized(cls))


def _normalizes_by_itself(cls: type[nn.Module]) -> bool:
    """Whether ``super().forward`` of a subclass would not lead to ours: it calls something else, or not that alone."""
    if _is_plain(cls):
        return False
    for base in cls.__mro__:
        if base is _BatchNorm or _is_plain(base):
            return "forward" in vars(base) and base not in (_BatchNorm, BatchNorm)
        for name, method in vars(base).items():
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if code is None or name == "__init__":
                continue
            if any("batch_norm" in used for used in code.co_names):
                return True
            if name == "forward" and ("super" not in code.co_names or _NAMES.intersection(code.co_names)):
                return True
    return False


def _blank(cls: Any) -> nn.Module:
    module: nn.Module = cls.__new__(cls)
    return module


def _as(cls: type, old: nn.Module) -> nn.Module:
    new = _blank(cls)
    new.__dict__ = old.__dict__.copy()
    return new


def _replace(
    module: nn.Module, change: Callable[[nn.Module, str], nn.Module], path: str, done: dict[nn.Module, nn.Module]
) -> nn.Module:
    """Applies ``change`` to every module below; one that is shared is changed once."""
    if module in done:
        return done[module]
    done[module] = new = change(module, path)
    for name, child in list(module._modules.items()):
        if child is not None:
            new._modules[name] = _replace(child, change, f"{path}.{name}" if path else name, done)
    return new


def convert_sync_batchnorm(module: nn.Module, process_set: Any = None) -> nn.Module:
    """Turns every batch norm of a model into a ``SyncBatchNorm``.

    Parameters, buffers, training flag, ``requires_grad``, hooks and devices are kept; a layer that is used in two places
    stays one layer. Collectives are named by the layer's path in ``module``. A subclass of ``nn.BatchNorm*`` keeps its own
    methods and normalises over all ranks where it calls ``super().forward``; one that does not, or that calls
    ``F.batch_norm``, is left alone, with a warning. ``nn.SyncBatchNorm`` and Horovod's are converted as well.

    Args:
        module: changed in place, apart from ``module`` itself where it is a batch norm.
        process_set: ``horovod.ProcessSet`` of the ranks that share the batch; None is all of them.

    Returns:
        ``module``, or its replacement where it is a batch norm.

    Raises:
        ValueError: a lazy batch norm has not seen its first batch yet.
    """

    def change(old: nn.Module, path: str) -> nn.Module:
        if isinstance(old, SyncBatchNorm):
            old.process_set = process_set
            old.collective_name = path or old.collective_name
            return old
        if not isinstance(old, _BatchNorm):
            return old
        if isinstance(old, _LazyNormBase):
            raise ValueError(
                f"the lazy layer {path!r} has no channel count yet: run a batch through the model before converting it. "
                f"Received: {old}"
            )
        cls: Any = type(old)
        if _normalizes_by_itself(cls):
            warnings.warn(
                f"{path!r} stays as it is: {cls.__name__} normalises by itself and not by super().forward, so its "
                "statistics will be this rank's alone",
                stacklevel=3,
            )
            return old
        new = _as(_synchronized(cls), old)
        new.__dict__.pop("process_group", None)  # torch.nn.SyncBatchNorm's
        if _is_plain(cls):
            new.__dict__.setdefault("activation", None)
        new.__dict__.update(process_set=process_set, collective_name=path or f"{cls.__name__}", _converted_from=cls)
        return new

    return _replace(module, change, "", {})


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Turns every ``SyncBatchNorm`` of a model back into the class that it was converted from.

    One that was made by hand, or came from ``nn.SyncBatchNorm``, becomes a batch norm of this rank's batch that takes inputs
    of any dimension (and keeps its activation). Everything else is kept, as in ``convert_sync_batchnorm``.

    Args:
        module: changed in place, apart from ``module`` itself where it is a ``SyncBatchNorm``.

    Returns:
        ``module``, or its replacement.
    """

    def change(old: nn.Module, path: str) -> nn.Module:
        if not isinstance(old, SyncBatchNorm):
            return old
        cls = old.__dict__.get("_converted_from", BatchNorm)
        own = cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) or not _is_plain(cls)
        if own and not _is_plain(cls):
            new = _as(cls, old)
        elif own and old.activation is None:
            new = _as(cls, old)
            new.__dict__.pop("activation")
        else:
            new = _as(BatchNorm, old)
        for name in _OURS:
            new.__dict__.pop(name, None)
        return new

    return _replace(module, change, "", {})
