"""Conversion of whole models to ``SyncBatchNorm`` and back, in place.

Conversion changes the class of a layer object. Its parameters, buffers and hooks stay valid, and so do lists, dictionaries and
optimizers that refer to them; a new object would leave these with the old layer.
"""

from __future__ import annotations

import functools
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
from hvd_syncbn.torch_impl.functional import rerun, sync_batch_norm
from hvd_syncbn.torch_impl.module import (
    ACCUMULATION,
    RENORM,
    RENORM_BUFFERS,
    TRACED_AS_LEAF,
    BatchNorm,
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
)
from hvd_syncbn.torch_impl.user_code import CLASSES, Names, is_batch_norm

Module = TypeVar("Module", bound=nn.Module)

_SYNCHRONIZED: dict[type, type] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    BatchNorm: SyncBatchNorm,
}
# The class to which a layer that was constructed directly reverts.
_REVERTED: dict[type, type] = {
    SyncBatchNorm1d: nn.BatchNorm1d,
    SyncBatchNorm2d: nn.BatchNorm2d,
    SyncBatchNorm3d: nn.BatchNorm3d,
}
# The attributes that a SyncBatchNorm adds to a BatchNorm.
_OURS = ("process_set", "collective_name", "_converted_from", "_renorm")


def _is_plain(cls: type) -> bool:
    return cls in _SYNCHRONIZED or cls.__module__.startswith("horovod.")


class _Redirected(TorchFunctionMode):
    """Mode in which ``F.batch_norm`` in training, under any name, runs the synchronized operator of one layer.

    The forward of the layer, and PyTorch's, run unchanged.
    """

    def __init__(self, layer: SyncBatchNorm) -> None:
        super().__init__()
        self.layer = layer
        self.used = False
        self.local: str | None = None  # a batch norm function that was called and cannot be redirected
        self.rerun = rerun()

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if function is torch.batch_norm:
            return self._batch_norm_of_torch(*args, **kwargs)
        if function is ops.sync_batch_norm:  # super().forward is that of SyncBatchNorm
            self.used = True
        elif function is Tensor.register_hook or function is Tensor.register_post_accumulate_grad_hook:
            return function(*self._with_redirected_hook(*args, **kwargs))
        elif not torch.compiler.is_compiling() and is_batch_norm(function):
            self.local = function.__name__
        return function(*args, **kwargs)

    def _with_redirected_hook(self, tensor: Tensor, hook: Callable[..., Any]) -> tuple[Tensor, Callable[..., Any]]:
        """Return the arguments with a hook that redirects, too, when it runs in the backward pass."""

        def redirected(*args: Any) -> Any:
            with _Redirected(self.layer):
                return hook(*args)

        return tensor, functools.update_wrapper(redirected, hook)

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
        self.used = True
        now, name = rerun(), self.layer.collective_name
        if training and self.rerun is not None and now is not None and self.rerun != now:
            cls = type_before_parametrizations(self.layer).__bases__[0].__name__
            raise RuntimeError(
                f"layer {name!r} calls F.batch_norm inside a checkpoint or an autograd.Function, which may run it again in the "
                "backward pass, where it would not be synchronized. "
                f"Received: a {cls} that passes a function other than its methods. Move the call to a method of {cls} and pass "
                "or call that method, or checkpoint the whole layer"
            )
        tensors = (input, running_mean, running_var, weight, bias)
        options = {"process_set": self.layer.process_set, "name": name, "skip_nonfinite": self.layer.skip_nonfinite}
        return sync_batch_norm(*tensors, training, momentum, eps, **options)

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


def _redirecting(own: Callable[..., Any], name: str, reruns: bool) -> Callable[..., Any]:
    """Wrap a user-defined method so that in training it normalizes over all ranks, also when autograd calls it again.

    Code that ``reruns`` parts in backward is not compiled, because the compiler would trace those parts without redirection.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return own(self, *args, **kwargs)
        return run(own, is_forward, self, *args, **kwargs)

    is_forward = name == "forward"
    reason = f"parts of {own.__qualname__} run in the backward pass, where hvd-syncbn synchronizes them in eager mode only"
    run = torch.compiler.disable(_run_redirected, reason=reason) if reruns else _run_redirected
    # TorchScript compiles the wrapped method but looks its names up in the wrapper's globals, so the wrapper gets its globals.
    code, names = forward.__code__, getattr(own, "__globals__", globals())
    return functools.update_wrapper(FunctionType(code, names, name, None, forward.__closure__), own)


def _run_redirected(own: Callable[..., Any], is_forward: bool, layer: Any, *args: Any, **kwargs: Any) -> Any:
    mode = _Redirected(layer)
    with mode:
        y = own(layer, *args, **kwargs)
    if mode.local or (is_forward and not mode.used):
        _warn_of_local_statistics(layer.collective_name, mode.local)
    return y


def _warn_of_local_statistics(name: str, function: str | None) -> None:
    called = f"It calls {function}" if function else "It calls neither super().forward nor F.batch_norm"
    warnings.warn(
        f"layer {name!r} uses the statistics of this rank only. {called}. Call F.batch_norm or super().forward instead",
        stacklevel=3,
    )


def _ignored_by_torchscript(layer: nn.Module) -> list[str]:
    """Return the attributes that TorchScript ignores, and raise in training mode.

    This is the first attribute that TorchScript reads. It compiles a user-defined forward without the redirection.
    """
    if layer.training:
        raise RuntimeError(
            "hvd-syncbn does not synchronize in TorchScript: call `.eval()` on the model before compiling it, or "
            f"`hvd_syncbn.torch.revert_sync_batchnorm`. Received: a {type(layer).__name__} in training mode"
        )
    return SyncBatchNorm.__jit_ignored_attributes__


@cache
def _synchronized(cls: Any) -> type:
    """Return the synchronized class for ``cls``; for a user-defined subclass, one whose ``super().forward`` is ours."""
    if _is_plain(cls):
        return _SYNCHRONIZED.get(cls, SyncBatchNorm)

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (cls,), *object.__reduce_ex__(self, protocol)[2:]

    constants = [*cls.__constants__, "_fused"]
    namespace: dict[str, Any] = {"__reduce_ex__": reduce, "__doc__": cls.__doc__, "__constants__": constants, "_fused": None}
    if any("forward" in vars(base) for base in _user_classes(cls)):
        reruns = Names(cls, (method for _, method in _methods(cls))).reruns()
        for name, method in _methods(cls):
            if name == "forward" or Names(cls, [method]).normalizes():
                namespace[name] = _redirecting(getattr(cls, name), name, reruns)
        namespace["__jit_ignored_attributes__"] = property(_ignored_by_torchscript)
        unused = getattr(cls, "__jit_unused_properties__", ())
        namespace["__jit_unused_properties__"] = [*unused, "_fused", "__jit_ignored_attributes__"]
    return type(f"Sync{cls.__name__}", (cls, SyncBatchNorm), namespace)


def _rebuild(cls: type) -> nn.Module:
    """Return an empty instance for pickle and deepcopy, because a converted subclass cannot be imported by name."""
    made: Any = _synchronized(cls)
    module: nn.Module = made.__new__(made)
    return module


def _become(module: nn.Module, cls: type) -> None:
    """Change the class of an object to ``cls``, or to a parametrized class of ``cls`` if the object is parametrized.

    Parametrization derives a class for one object. Removing it restores the base class.
    """
    if is_parametrized(module):
        own = dict(vars(type(module)))
        before = own.pop("_before", None)
        if before is not None and before.__bases__ == (cls,) and _properties(before) == _properties(type(module)):
            cls = before
        else:
            cls = type(f"Parametrized{cls.__name__}", (cls,), {**own, "_before": type(module)})
    object.__setattr__(module, "__class__", cls)  # bypasses a user-defined __setattr__


def _properties(cls: type) -> set[str]:
    return {name for name, value in vars(cls).items() if isinstance(value, property)}


def _user_classes(cls: type) -> Iterator[type]:
    """Return the user-defined classes of a batch norm, the most derived first."""
    return itertools.takewhile(lambda base: base is not _BatchNorm and not _is_plain(base), cls.__mro__)


def _methods(cls: type) -> Iterator[tuple[str, FunctionType]]:
    """Return the names and methods of the user-defined classes, including overridden ones but not Python's ``__names__``."""
    for base in _user_classes(cls):
        for name, member in vars(base).items():
            if isinstance(member, FunctionType) and not name.startswith("__"):
                yield name, member


_REMEDY = "Call super().forward or F.batch_norm in it"


def _own_normalization(cls: type) -> tuple[str, str] | None:
    """Return why a batch norm class would not use our forward, and the remedy; None if its code seems to call it."""
    classes = list(_user_classes(cls))
    base = cls.__mro__[len(classes)]
    if classes and base not in (_BatchNorm, BatchNorm) and "forward" in vars(base):
        reason = f"the forward of its base class {base.__module__}.{base.__name__} synchronizes by itself"
        return reason, f"Derive {cls.__name__} from torch.nn.BatchNorm2d (or 1d, 3d)"
    if not any("forward" in vars(base) for base in classes):
        return None
    members = itertools.chain.from_iterable(vars(base).items() for base in classes)
    used = Names(cls, (member for name, member in members if name != "__init__"))
    others = [name for name in used.functions() if name != "batch_norm"]
    if others:
        return f"{cls.__name__} calls {others[0]}", _REMEDY
    if not used.normalizes() and "super" not in used.names:
        return f"{cls.__name__} calls neither super().forward nor F.batch_norm", _REMEDY
    return None


def _local_in_backward(cls: type) -> Iterator[str]:
    """Return the names of the ``autograd.Function`` classes that ``cls`` calls and whose backward calls a batch norm."""
    for name, backward in Names(cls, (method for _, method in _methods(cls))).backwards.items():
        if Names(cls, [backward]).functions():
            yield name


def _plain_extras(cls: type) -> tuple[str, ...]:
    """Return the attributes that only layers of PyTorch or Horovod get, because a subclass may define its own."""
    return ("activation",) if _is_plain(cls) and cls is not BatchNorm else ()


def _obstacle(layer: nn.Module) -> tuple[str, str] | None:
    """Return why a batch norm cannot be converted, and the remedy; None if it can."""
    cls = type_before_parametrizations(layer)
    own = _own_normalization(cls)
    if own is not None:
        return own
    if "forward" in vars(layer):
        return f"the forward of this {cls.__name__} was replaced on the object", "Define it in a subclass"
    taken = [name for name in (*_OURS, *_plain_extras(cls)) if hasattr(layer, name)]
    return (f"{cls.__name__} already has an attribute {taken[0]!r}", "Rename that attribute") if taken else None


def _unsynchronized(model: nn.Module) -> Iterator[str]:
    """Return a message for every other part of a model that computes statistics of one rank only."""
    registered = set(model.modules())
    for path, module in model.named_modules():
        prefix, cls = f"{path}." if path else "", type(module)
        if isinstance(module, torch.jit.ScriptModule):
            if module.original_name in CLASSES:
                yield _unchanged("layer", path, "it is compiled by TorchScript", "Convert the model before compiling it")
            continue
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function" and "batch_norm" in str(node.target):
                    reason = "it is an operation of a traced graph"
                    yield _unchanged("operation", prefix + node.name, reason, "Convert the model before tracing it")
        elif not isinstance(module, _BatchNorm) and not cls.__module__.startswith("torch."):
            yield from _by_a_function(path, module)
        hooks = Names(module, (hook for name in _HOOKS for hook in vars(module).get(name, {}).values())).functions()
        if hooks:
            yield _unchanged("the hook of layer", path, f"it calls {hooks[0]}", "Call a method of the layer in the hook")
        for name, value in vars(module).items():
            if any(norm not in registered and norm.training for norm in _norms_in(value)):
                reason = "it is in a plain list or dictionary, which torch.nn does not register"
                yield _unchanged("layer", prefix + name, reason, "Use nn.ModuleList or nn.ModuleDict")


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _by_a_function(path: str, module: nn.Module) -> Iterator[str]:
    """Return a message if a module that is not a batch norm calls a batch norm function in its forward."""
    cls = type(module).__name__
    called = Names(module, [vars(module).get("forward", type(module).forward)]).functions()
    inner = [name for name, child in module.named_children() if isinstance(child, _BatchNorm)]
    # torch_geometric's BatchNorm calls the function only for graphs of one node, and only with this option.
    if not called or (inner and getattr(module, "allow_single_element", None) is False):
        return
    if not inner:
        remedy = "Use a torch.nn.BatchNorm there, or hvd_syncbn.torch.sync_batch_norm"
        yield _unchanged("module", path, f"{cls} calls {called[0]} and is not a torch.nn.BatchNorm", remedy)
        return
    name = f"{path}.{inner[0]}" if path else inner[0]
    yield (
        f"layer {name!r} is converted, but {path or cls!r} ({cls}) also calls {called[0]} directly. On a rank that takes that "
        "path, the batch is not synchronized, and the other ranks wait for it in the layer. Make all ranks call the layer in "
        "every training step (in torch_geometric: allow_single_element=False)"
    )


def _unchanged(what: str, path: str, reason: str, remedy: str) -> str:
    return f"{what} {path!r} is left unchanged: {reason}. hvd-syncbn does not synchronize its statistics. {remedy}"


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


def _collective_name(model: nn.Module, path: str) -> str:
    """Return the model's class and the layer's path in it; "" for the model itself.

    The name depends only on the model, so it is the same on a rank that has created other models, loads this one from a file,
    or joins an elastic job. It does not contain the number of channels, so that ranks that disagree about it get an error.
    """
    first, _, rest = path.partition(".")
    if first == "_orig_mod":  # in the wrapper that torch.compile returns
        model, path = model.get_submodule(first), rest
    return f"{type_before_parametrizations(model).__name__}.{path}" if path else ""


def convert_sync_batchnorm(module: Module, process_set: Any = None) -> Module:
    """Convert every batch norm of a model to a ``SyncBatchNorm``, in place.

    A layer stays the same object and an instance of its class: ``nn.BatchNorm2d`` becomes ``SyncBatchNorm2d``, a subclass.
    Parameters, buffers, training flag, ``requires_grad``, hooks and devices are kept; a layer that is used in two places stays
    one layer. Collectives are named by the class of ``module`` and the layer's path in it, so convert several models of one
    class together, as ``nn.ModuleDict(a=a, b=b)``. A subclass of ``nn.BatchNorm*`` keeps its methods and normalizes over all
    ranks where it calls ``super().forward`` or ``F.batch_norm``; if it calls neither, it is left unchanged with a warning.
    ``nn.SyncBatchNorm`` and Horovod's layer are converted as well.

    Args:
        module: model, changed in place.
        process_set: the ranks that share the batch: a ``horovod.ProcessSet``, a ``torch.distributed.ProcessGroup`` or a 1-D
            ``DeviceMesh``. None is all ranks of Horovod if it is initialized, else those of torch.distributed.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        ValueError: a lazy batch norm has not seen its first batch. The model is then unchanged.

    Warns:
        UserWarning: a batch norm of the model is not synchronized; the message names it, the reason and the remedy.
    """
    _check(module)
    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
    for path, layer in layers:
        if isinstance(layer, _LazyNormBase):
            raise ValueError(
                f"the lazy layer {path!r} has no channel count yet. First run a batch through the model, then convert it. "
                f"Received: {layer}"
            )
    if not layers:
        name = type(module).__name__
        warnings.warn(f"nothing to convert: no torch.nn.BatchNorm1d, 2d or 3d in the model. Received: {name}", stacklevel=2)
    for message in _unsynchronized(module):
        warnings.warn(message, stacklevel=2)
    for path, layer in layers:
        if isinstance(layer, SyncBatchNorm):
            layer.process_set = process_set
            layer.collective_name = _collective_name(module, path) or layer.collective_name
            continue
        cls = type_before_parametrizations(layer)
        obstacle = _obstacle(layer)
        if obstacle is not None:
            warnings.warn(_unchanged("layer", path, *obstacle), stacklevel=2)
            continue
        for function in _local_in_backward(cls):
            warnings.warn(
                f"layer {path!r} is converted, but {function}.backward calls a batch norm function, which hvd-syncbn does not "
                "synchronize there. Call a method of the layer instead",
                stacklevel=2,
            )
        _become(layer, _synchronized(cls))
        vars(layer).update(dict.fromkeys(_plain_extras(cls)))
        name = _collective_name(module, path) or cls.__name__
        vars(layer).update(TRACED_AS_LEAF, process_set=process_set, collective_name=name, _converted_from=cls)
    return module


def revert_sync_batchnorm(module: Module) -> Module:
    """Convert every ``SyncBatchNorm`` of a model back to its original class, in place.

    A layer that was constructed directly becomes a batch norm of this rank's batch: ``SyncBatchNorm1d``, ``2d`` and ``3d``
    become ``nn.BatchNorm1d``, ``2d`` and ``3d``; ``SyncBatchNorm`` and layers with an activation become a batch norm for inputs
    of any dimension that keeps the activation. Everything else is kept, as in ``convert_sync_batchnorm``.

    Args:
        module: model, changed in place.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.

    Warns:
        UserWarning: a layer has ``zero_debias`` or ``renorm``, which PyTorch's layers do not support.
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
                f"{path!r} averages with its momentum only, because torch.nn's layers have no zero_debias. "
                "Received: zero_debias=True",
                stacklevel=2,
            )
        if vars(layer).get("_renorm") is not None:
            warnings.warn(
                f"{path!r} no longer does batch renormalization, which torch.nn's layers do not support. Received: renorm=True",
                stacklevel=2,
            )
            for name in RENORM:
                delattr(layer, name)
            for name in RENORM_BUFFERS:
                delattr(layer, name)
        for name in (
            *_OURS,
            *ACCUMULATION,
            "skip_nonfinite",
            *_plain_extras(cls),
            *(TRACED_AS_LEAF if cls is not BatchNorm else ()),
        ):
            vars(layer).pop(name, None)
    return module
