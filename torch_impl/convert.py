"""Conversion of whole models to ``SyncBatchNorm`` and back, in place.

A layer changes its class and stays the object that it was: its parameters, buffers and hooks, and every list, dictionary and
optimizer that knows it or them, are as good after as before. Copying it into a new object would leave those with the old one.
"""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from hvd_syncbn.torch_impl.module import (
    TRACED_AS_LEAF,
    BatchNorm,
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
)

Module = TypeVar("Module", bound=nn.Module)

_SYNCHRONIZED: dict[type, type] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    BatchNorm: SyncBatchNorm,
}
# The class that one made by hand reverts to.
_REVERTED: dict[type, type] = {
    SyncBatchNorm1d: nn.BatchNorm1d,
    SyncBatchNorm2d: nn.BatchNorm2d,
    SyncBatchNorm3d: nn.BatchNorm3d,
}
# What a SyncBatchNorm has beside a BatchNorm.
_OURS = ("process_set", "collective_name", "_converted_from")
_NAMES = {cls.__name__ for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, _BatchNorm)}


def _is_plain(cls: type) -> bool:
    return cls in _SYNCHRONIZED or cls.__module__.startswith("horovod.")


@cache
def _synchronized(cls: type) -> type:
    """The class that objects of ``cls`` become; for somebody's subclass one in which its ``super().forward`` is ours."""
    if _is_plain(cls):
        return _SYNCHRONIZED.get(cls, SyncBatchNorm)

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (cls,), *object.__reduce_ex__(self, protocol)[2:]

    namespace = {"__reduce_ex__": reduce, "__doc__": cls.__doc__, "_fused": None}
    return type(f"Sync{cls.__name__}", (cls, SyncBatchNorm), namespace)


def _rebuild(cls: type) -> nn.Module:
    """An empty instance for pickle and deepcopy: the class made for a subclass has no name to import it by."""
    made: Any = _synchronized(cls)
    module: nn.Module = made.__new__(made)
    return module


def _become(module: nn.Module, cls: type) -> None:
    """Makes an object one of class ``cls``, or of what its parametrizations make of that.

    Parametrizing gives an object a class of its own, made from the class before, to which it goes back when they are removed.
    """
    if is_parametrized(module):
        own = dict(vars(type(module)))
        before = own.pop("_before", None)
        if before is not None and before.__bases__ == (cls,) and _properties(before) == _properties(type(module)):
            cls = before
        else:
            cls = type(f"Parametrized{cls.__name__}", (cls,), {**own, "_before": type(module)})
    object.__setattr__(module, "__class__", cls)  # past a __setattr__ of somebody's


def _properties(cls: type) -> set[str]:
    return {name for name, value in vars(cls).items() if isinstance(value, property)}


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


def _plain_extras(cls: type) -> tuple[str, ...]:
    """What a layer of PyTorch's or Horovod's gets besides; somebody's subclass may have its own."""
    return ("activation",) if _is_plain(cls) and cls is not BatchNorm else ()


def _obstacle(layer: nn.Module) -> str | None:
    """Why a batch norm cannot be converted."""
    cls = type_before_parametrizations(layer)
    if _normalizes_by_itself(cls):
        return f"{cls.__name__} normalises by itself and not by super().forward"
    if "forward" in vars(layer):
        return f"the forward of this {cls.__name__} was replaced on the object"
    taken = [name for name in (*_OURS, *_plain_extras(cls)) if hasattr(layer, name)]
    return f"{cls.__name__} has an attribute {taken[0]!r} of its own" if taken else None


def _check(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module. Received: an instance of {type(module).__module__}.{type(module).__name__}"
        )


def convert_sync_batchnorm(module: Module, process_set: Any = None) -> Module:
    """Turns every batch norm of a model into a ``SyncBatchNorm``, in place.

    A layer stays the object that it was, and an instance of its class: ``nn.BatchNorm2d`` becomes ``SyncBatchNorm2d``, which is
    one. Parameters, buffers, training flag, ``requires_grad``, hooks and devices are kept; a layer that is used in two places
    stays one layer. Collectives are named by the layer's path in ``module``. A subclass of ``nn.BatchNorm*`` keeps its own
    methods and normalises over all ranks where it calls ``super().forward``; one that does not, or that calls ``F.batch_norm``,
    is left alone, with a warning. ``nn.SyncBatchNorm`` and Horovod's are converted as well.

    Args:
        module: changed in place.
        process_set: ``horovod.ProcessSet`` of the ranks that share the batch; None is all of them.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no ``torch.nn.Module``.
        ValueError: a lazy batch norm has not seen its first batch yet. Nothing is changed then.
    """
    _check(module)
    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
    for path, layer in layers:
        if isinstance(layer, _LazyNormBase):
            raise ValueError(
                f"the lazy layer {path!r} has no channel count yet: run a batch through the model before converting it. "
                f"Received: {layer}"
            )
    if not layers:
        name = type(module).__name__
        warnings.warn(f"nothing to convert: no torch.nn.BatchNorm1d, 2d or 3d in the model. Received: {name}", stacklevel=2)
    for path, layer in layers:
        if isinstance(layer, SyncBatchNorm):
            layer.process_set = process_set
            layer.collective_name = path or layer.collective_name
            continue
        cls = type_before_parametrizations(layer)
        reason = _obstacle(layer)
        if reason is not None:
            warnings.warn(f"{path!r} stays as it is: {reason}, so its statistics will be this rank's alone", stacklevel=2)
            continue
        _become(layer, _synchronized(cls))
        vars(layer).update(dict.fromkeys(_plain_extras(cls)))
        vars(layer).update(TRACED_AS_LEAF, process_set=process_set, collective_name=path or cls.__name__, _converted_from=cls)
    return module


def revert_sync_batchnorm(module: Module) -> Module:
    """Turns every ``SyncBatchNorm`` of a model back into what it was converted from, in place.

    One that was made by hand becomes a batch norm of this rank's batch: ``SyncBatchNorm1d``, ``2d`` and ``3d`` the
    ``nn.BatchNorm`` that they are, ``SyncBatchNorm`` and all that have an activation one that takes inputs of any dimension and
    keeps the activation. Everything else is kept, as in ``convert_sync_batchnorm``.

    Args:
        module: changed in place.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no ``torch.nn.Module``.
    """
    _check(module)
    for layer in module.modules():
        if not isinstance(layer, SyncBatchNorm):
            continue
        made = type_before_parametrizations(layer)
        cls = layer.__dict__.get("_converted_from") or _REVERTED.get(made, BatchNorm)
        if _is_plain(cls) and layer.activation is not None:
            cls = BatchNorm
        _become(layer, cls)
        for name in (*_OURS, *_plain_extras(cls), *(TRACED_AS_LEAF if cls is not BatchNorm else ())):
            vars(layer).pop(name, None)
    return module
