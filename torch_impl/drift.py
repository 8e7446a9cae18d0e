"""``check_ranks_agree``: whether all ranks still hold the same model and optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from hvd_syncbn import drift
from hvd_syncbn.drift import Entry
from hvd_syncbn.torch_impl import ranks
from hvd_syncbn.torch_impl.module import SyncBatchNorm

_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)


def check_ranks_agree(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    local: Iterable[nn.Module | Tensor] = (),
    process_set: Any = None,
) -> None:
    """Raises an error on every rank if the ranks do not hold the same weights, buffers, optimizer state and learning rates.

    All ranks have to call it together, for example at the end of every epoch. They compare digests: one small allgather, and
    about 30 ms for 25 million parameters and their momentum. Equality is that of bytes. What is each rank's own by design is
    left out: the statistics of norms that are not synchronized, and ``local``. A norm that is synchronized in a process set,
    and an optimizer that averages in one, are compared inside that set.

    Args:
        model: The model.
        optimizer: The optimizer, or several.
        local: Modules, parameters and buffers that differ between ranks by design.
        process_set: the ranks that compare, as in ``convert_sync_batchnorm``; None is all of them.

    Raises:
        TypeError: ``model`` is no module, ``optimizer`` no optimizer, or ``local`` holds anything else.
        RuntimeError: The ranks differ: the message names the first value that does, the ranks, and likely causes. Or neither
            Horovod nor torch.distributed is initialized.

    Example:
        >>> import horovod.torch as hvd, torch
        >>> from hvd_syncbn.torch import check_ranks_agree
        >>> hvd.init()
        >>> model = torch.nn.Linear(2, 1)
        >>> check_ranks_agree(model, torch.optim.SGD(model.parameters(), lr=0.1))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module. Received: {type(model).__name__}")
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer or a list of them. Received: {type(one).__name__}")
    own = _own(local)
    group = ranks.find(process_set)
    if group.size == 1:
        return
    difference = drift.find_difference(
        lambda: _entries(model, optimizers, own),
        group.rank,
        group.ranks,
        lambda value: group.gather(value, "check_ranks_agree"),
    )
    if difference is not None:
        raise RuntimeError(difference.message)


def _own(local: Iterable[nn.Module | Tensor]) -> set[int]:
    """Return the ids of the tensors that are each rank's own."""
    own: set[int] = set()
    for one in local:
        if isinstance(one, nn.Module):
            own.update(map(id, (*one.parameters(), *one.buffers())))
        elif isinstance(one, Tensor):
            own.add(id(one))
        else:
            raise TypeError(f"expected modules, parameters and buffers in `local`. Received: {type(one).__name__}")
    return own


def _entries(model: nn.Module, optimizers: Sequence[Optimizer], own: set[int]) -> Iterator[Entry]:
    """List what ranks have to hold alike: what causes differences before what they lead to."""
    for label, optimizer in _labelled(optimizers):
        scope = _scope(optimizer)
        for i, group in enumerate(optimizer.param_groups):
            yield Entry(drift.LEARNING_RATE, f"{label}.param_groups[{i}]", _plain(group.get("lr")), scope)
            # Of a scheduler that only one rank has, the rate says more than the `initial_lr` that it adds.
            others = {key: _plain(v) for key, v in group.items() if key not in ("lr", "initial_lr", "params", "param_names")}
            plain = {key: v for key, v in sorted(others.items()) if isinstance(v, bool | int | float | str | tuple | None)}
            yield Entry(drift.HYPERPARAMETERS, f"{label}.param_groups[{i}]", plain, scope)
    trained_in = {id(p): _scope(o) for o in optimizers for group in o.param_groups for p in group["params"]}
    names = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)] = name
        if id(parameter) not in own:
            yield Entry(drift.WEIGHT, name, _value(parameter), trained_in.get(id(parameter)))
    for label, optimizer in _labelled(optimizers):
        for i, group in enumerate(optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                if id(parameter) in own:
                    continue
                owner = names.get(id(parameter), f"param_groups[{i}]['params'][{j}]")
                for path, value in _flat(optimizer.state.get(parameter, {})):
                    yield Entry(drift.OPTIMIZER_STATE, f"{label} {owner}{path}", _value(value), _scope(optimizer))
    local = set(own)
    for module in model.modules():
        if isinstance(module, _NormBase):
            local.update(map(id, module.buffers(recurse=False)))
    for path, module in model.named_modules():
        if isinstance(module, SyncBatchNorm):
            scope = ranks.members_of(module.process_set)
            for name, buffer in module.named_buffers(path, recurse=False):
                if id(buffer) not in own:
                    yield Entry(drift.STATISTICS, name, _value(buffer), scope)
    for name, buffer in model.named_buffers():
        if id(buffer) not in local:
            yield Entry(drift.OTHER, name, _value(buffer))


def _labelled(optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Optimizer]]:
    for i, optimizer in enumerate(optimizers):
        yield type(optimizer).__name__ + (f" {i}" if len(optimizers) > 1 else ""), optimizer


def _scope(optimizer: Optimizer) -> tuple[int, ...] | None:
    return ranks.members_of(getattr(optimizer, "process_set", None))  # Horovod's


def _flat(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """List the tensors and numbers in an optimizer's state of a parameter."""
    if isinstance(state, Mapping):
        for key in sorted(state, key=str):
            yield from _flat(state[key], f"{path}.{key}")
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            yield from _flat(value, f"{path}[{i}]")
    elif isinstance(state, Tensor | bool | int | float | str | None):
        yield path, state


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _value(value: Any) -> Any:
    """Return a tensor as an array of NumPy's dtypes, without a copy where there is no need."""
    if not isinstance(value, Tensor):
        return value
    if torch.nn.parameter.is_lazy(value):
        return "not initialized"
    if value.is_meta:
        return f"{value.dtype} of shape {tuple(value.shape)} on meta"
    tensor = value.detach()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_floating_point() and tensor.dtype not in _NUMPY_FLOATS:
        tensor = tensor.float()  # exact
    if tensor.dtype == torch.complex32:
        tensor = torch.view_as_real(tensor)
    array: np.ndarray[Any, Any] = tensor.cpu().resolve_conj().resolve_neg().numpy()
    return array


__all__ = ["check_ranks_agree"]
