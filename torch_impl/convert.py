"""Conversion of whole models to ``SyncBatchNorm`` and back, in place.

A layer changes its class and stays the object that it was: its parameters, buffers and hooks, and every list, dictionary and
optimizer that knows it or them, are as good after as before. Copying it into a new object would leave those with the old one.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.overrides import TorchFunctionMode

from hvd_syncbn.torch_impl import ops
from hvd_syncbn.torch_impl.functional import sync_batch_norm
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


class _Redirected(TorchFunctionMode):
    """Within it, ``F.batch_norm`` of a training batch is the layer's, over all ranks: of whoever calls it, by whatever name.

    The layer's own forward, and PyTorch's, run as they are written.
    """

    def __init__(self, layer: SyncBatchNorm) -> None:
        super().__init__()
        self.options = {"process_set": layer.process_set, "name": layer.collective_name}
        self.used = False

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm:
            self.used = True
            return self._batch_norm(*args, **kwargs)
        if function is torch.batch_norm:
            self.used = True
            return self._batch_norm_of_torch(*args, **kwargs)
        if function is ops.sync_batch_norm:  # where super().forward is SyncBatchNorm's
            self.used = True
        return function(*args, **kwargs)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        return sync_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, **self.options)

    def _batch_norm_of_torch(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        return self._batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _redirecting(own: Callable[..., Any]) -> Callable[..., Any]:
    """Somebody's forward, which normalises over all ranks in training."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return own(self, *args, **kwargs)
        mode = redirected(self)
        with mode:
            y = own(self, *args, **kwargs)
        if not mode.used:
            warn(
                f"layer {self.collective_name!r} has normalised by itself, by neither super().forward nor F.batch_norm: "
                "its statistics are this rank's alone"
            )
        return y

    redirected, warn = _Redirected, warnings.warn
    # TorchScript compiles what is wrapped, and looks its names up in the wrapper's module: so this one's is theirs.
    code, names = forward.__code__, getattr(own, "__globals__", globals())
    return functools.update_wrapper(FunctionType(code, names, "forward", None, forward.__closure__), own)


def _ignored_by_torchscript(layer: nn.Module) -> list[str]:
    """What TorchScript asks for first. It compiles their forward as it is, where nothing leads ``F.batch_norm`` to us."""
    if layer.training:
        raise RuntimeError(
            "hvd-syncbn does not synchronise in TorchScript: call `.eval()` on the model before compiling it, or "
            f"`hvd_syncbn.torch.revert_sync_batchnorm`. Received: a {type(layer).__name__} in training mode"
        )
    return SyncBatchNorm.__jit_ignored_attributes__


@cache
def _synchronized(cls: Any) -> type:
    """The class that objects of ``cls`` become; for somebody's subclass one in which its ``super().forward`` is ours."""
    if _is_plain(cls):
        return _SYNCHRONIZED.get(cls, SyncBatchNorm)

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (cls,), *object.__reduce_ex__(self, protocol)[2:]

    constants = [*cls.__constants__, "_fused"]
    namespace: dict[str, Any] = {"__reduce_ex__": reduce, "__doc__": cls.__doc__, "__constants__": constants, "_fused": None}
    if any("forward" in vars(base) for base in _somebodys(cls)):
        namespace["forward"] = _redirecting(cls.forward)
        namespace["__jit_ignored_attributes__"] = property(_ignored_by_torchscript)
        unused = getattr(cls, "__jit_unused_properties__", ())
        namespace["__jit_unused_properties__"] = [*unused, "_fused", "__jit_ignored_attributes__"]
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


def _somebodys(cls: type) -> Iterator[type]:
    """The classes of a batch norm that are neither PyTorch's nor Horovod's, the most derived first."""
    return itertools.takewhile(lambda base: base is not _BatchNorm and not _is_plain(base), cls.__mro__)


def _normalizes_by_itself(cls: type) -> bool:
    """Whether the forward of a subclass shows nothing that leads to ours: no ``super()``, no ``batch_norm``, no such class."""
    classes = list(_somebodys(cls))
    base = cls.__mro__[len(classes)]
    if classes and base not in (_BatchNorm, BatchNorm) and "forward" in vars(base):
        return True  # of torch.nn.SyncBatchNorm or Horovod's, which send by themselves
    if not any("forward" in vars(base) for base in classes):
        return False
    used: set[str] = set()  # by forward, or by a method that it may call
    for name, member in itertools.chain.from_iterable(vars(base).items() for base in classes):
        code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) and name != "__init__" else None
        names = set(code.co_names if code else ())
        used |= names if name == "forward" or "forward" in names else names - {"super"}
    other = any("batch_norm" in name and name != "batch_norm" for name in used)
    return other or not used & {"super", "batch_norm", *_NAMES}


def _plain_extras(cls: type) -> tuple[str, ...]:
    """What a layer of PyTorch's or Horovod's gets besides; somebody's subclass may have its own."""
    return ("activation",) if _is_plain(cls) and cls is not BatchNorm else ()


def _obstacle(layer: nn.Module) -> str | None:
    """Why a batch norm cannot be converted."""
    cls = type_before_parametrizations(layer)
    if _normalizes_by_itself(cls):
        return f"{cls.__name__} normalises by itself, by neither super().forward nor F.batch_norm"
    if "forward" in vars(layer):
        return f"the forward of this {cls.__name__} was replaced on the object"
    taken = [name for name in (*_OURS, *_plain_extras(cls)) if hasattr(layer, name)]
    return f"{cls.__name__} has an attribute {taken[0]!r} of its own" if taken else None


def _out_of_reach(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The path of whatever else computes statistics of this rank alone, and why it is left as it is."""
    registered = set(model.modules())
    for path, module in model.named_modules():
        prefix, cls = f"{path}." if path else "", type(module)
        if isinstance(module, torch.jit.ScriptModule):
            if module.original_name in _NAMES:
                yield path, "it is compiled by TorchScript (convert the model first)"
            continue
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function" and "batch_norm" in str(node.target):
                    yield prefix + node.name, "it is an operation of a traced graph (convert the model first)"
        elif not isinstance(module, _BatchNorm) and not cls.__module__.startswith("torch."):
            code = getattr(inspect.unwrap(cls.forward), "__code__", None)
            if code and "batch_norm" in code.co_names and not hasattr(module, "batch_norm"):
                yield path, f"{cls.__name__} calls batch_norm and is no torch.nn.BatchNorm"
        for name, value in vars(module).items():
            if any(norm not in registered and norm.training for norm in _norms_in(value)):
                yield prefix + name, "torch.nn does not see what is in a plain list or dictionary (use nn.ModuleList)"


def _norms_in(value: object, depth: int = 3) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield from (
            module for module in value.modules() if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm)
        )
    elif isinstance(value, list | tuple | dict) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _norms_in(item, depth - 1)


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
    methods and normalises over all ranks where it calls ``super().forward`` or ``F.batch_norm``; one that does neither is left
    alone, with a warning. ``nn.SyncBatchNorm`` and Horovod's are converted as well.

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
    for path, reason in _out_of_reach(module):
        warnings.warn(f"{path!r} stays as it is: {reason}, so its statistics will be this rank's alone", stacklevel=2)
    for path, layer in layers:
        if isinstance(layer, SyncBatchNorm):
            layer.process_set = process_set
            layer.collective_name = path or layer.collective_name
            continue
        cls = type_before_parametrizations(layer)
        obstacle = _obstacle(layer)
        if obstacle is not None:
            warnings.warn(f"{path!r} stays as it is: {obstacle}, so its statistics will be this rank's alone", stacklevel=2)
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
    for path, layer in module.named_modules():
        if not isinstance(layer, SyncBatchNorm):
            continue
        made = type_before_parametrizations(layer)
        cls = layer.__dict__.get("_converted_from") or _REVERTED.get(made, BatchNorm)
        if _is_plain(cls) and layer.activation is not None:
            cls = BatchNorm
        _become(layer, cls)
        if vars(layer).pop("zero_debias", False):
            warnings.warn(
                f"{path!r} averages with its momentum alone from now on, as torch.nn's layers do. Received: zero_debias=True",
                stacklevel=2,
            )
        for name in (*_OURS, *_plain_extras(cls), *(TRACED_AS_LEAF if cls is not BatchNorm else ())):
            vars(layer).pop(name, None)
    return module
