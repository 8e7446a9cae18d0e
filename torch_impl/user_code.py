"""Finds calls of batch norm functions in the byte code of user-defined classes, which conversion does not reach.

Unlike a first training step, byte code also shows rarely executed paths (small batches, the backward pass), on every rank.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Iterable
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

# The classes whose forward calls F.batch_norm.
CLASSES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "_BatchNorm")
_LIBRARIES = {"torch", "numpy", "horovod", "hvd_syncbn", *sys.stdlib_module_names}


class Names:
    """The names that functions use in their code, in nested functions, and in the functions and methods that they call.

    Attributes of ``self`` are looked up in ``owner``, a module or its class. Calls are followed up to ``DEPTH`` levels, but not
    into libraries.
    """

    DEPTH = 5

    def __init__(self, owner: object, functions: Iterable[object]) -> None:
        self.owner = owner
        self.names: set[str] = set()
        self.backwards: dict[str, object] = {}  # the backward of each autograd.Function among them
        self.seen: set[int] = set()
        for function in functions:
            self._follow(function, 0)

    def normalizes(self) -> bool:
        """Return whether ``F.batch_norm``, or a class whose forward calls it, is among the names."""
        return bool(self.names & {"batch_norm", *CLASSES})

    def reruns(self) -> bool:
        """Return whether a name runs code in the backward pass."""
        return bool(self.backwards or self.names & {"checkpoint", "register_hook", "register_post_accumulate_grad_hook"})

    def functions(self) -> list[str]:
        """Return the names of PyTorch's batch norm functions, ``batch_norm`` first."""
        return sorted(self.names & batch_norm_functions(), key=lambda name: (name != "batch_norm", name))

    def _follow(self, value: object, depth: int) -> None:
        while isinstance(value, functools.partial):
            value = value.func
        if isinstance(value, property):
            value = value.fget
        value = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else None
        if not isinstance(value, FunctionType | type | nn.Module):
            value = next(filter(_is_users, _attributes(type(value), "__call__")), value)
        if isinstance(value, type):
            self.names.add(value.__name__)
            if issubclass(value, torch.autograd.Function):
                self.backwards[value.__name__] = value.backward
        elif value is F.batch_norm:
            self.names.add("batch_norm")
        elif not isinstance(value, FunctionType) and is_batch_norm(value):  # torch.batch_norm or an operator, by any name
            self.names.add(_name(value))
        elif getattr(value, "__module__", None) == "torch.utils.checkpoint":
            self.names.add("checkpoint")
        elif _is_users(value) and id(value) not in self.seen and depth < self.DEPTH:
            self.seen.add(id(value))
            cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
            scope = {**value.__globals__, **{name: _content(cell) for name, cell in cells.items()}}
            self._read(value.__code__, scope, value.__name__ == "forward", depth + 1)

    def _read(self, code: CodeType, scope: dict[str, object], is_forward: bool, depth: int) -> None:
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        for base, of, name in _loads(code):
            values: list[object] = []
            if of is None:
                values.append(scope.get(name))
            elif of in ("self", ""):  # self.name, super().name
                values += _attributes(self.owner, name)
            elif base == "self":  # self.of.name
                values += (value for holder in _attributes(self.owner, of) for value in _attributes(holder, name))
            elif isinstance(scope.get(of), ModuleType | type):
                values.append(vars(scope[of]).get(name))
            for value in values:
                self._follow(value, depth)
            if base in ("self", *arguments) or any(map(_is_users, values)):
                continue  # an attribute of an object, or a function that was followed
            if name != "super" or is_forward or "forward" in code.co_names:  # super() in other methods does not call forward
                self.names.add(name)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._read(constant, scope, is_forward, depth)


@cache
def _loads(code: CodeType) -> list[tuple[str, str | None, str]]:
    """Return the names that code loads, each with the variable that starts its expression and the name before it.

    ``F.relu`` gives ``("", None, "F")`` and ``("F", "F", "relu")``. For an attribute of a call's result both are empty.
    """
    loads: list[tuple[str, str | None, str]] = []
    base = of = ""
    for instruction in dis.get_instructions(code):
        kind, name = instruction.opname, instruction.argval
        if kind.startswith(("LOAD_FAST", "LOAD_GLOBAL", "LOAD_DEREF")) and isinstance(name, str):
            base = of = name
            if not kind.startswith("LOAD_FAST"):
                loads.append(("", None, name))
        elif kind.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER")):
            loads.append((base, of, name))
            of = name
        else:
            base = of = ""
    return loads


def _attributes(holder: object, name: str) -> list[object]:
    """Return all values of an attribute in an object and its classes, including overridden ones, but not child modules."""
    classes = holder.__mro__ if isinstance(holder, type) else (holder, *type(holder).__mro__)
    return [found for place in classes if (found := getattr(place, "__dict__", {}).get(name)) is not None]


def _is_users(value: object) -> TypeGuard[FunctionType]:
    return isinstance(value, FunctionType) and (value.__module__ or "").split(".")[0] not in _LIBRARIES


@cache
def batch_norm_functions() -> set[str]:
    """Return the names of PyTorch's batch norm functions and operators."""
    operators = (name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    return {name.removeprefix("aten::") for name in operators if "batch_norm" in name}


def _name(function: object) -> str:
    """Return the name of a function or an operator, without its overload."""
    return str(getattr(function, "__name__", "")).split(".")[0]


def is_batch_norm(function: object) -> bool:
    """Return whether a function that PyTorch dispatches is one of its batch norms, by name."""
    return _name(function) in batch_norm_functions()


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
