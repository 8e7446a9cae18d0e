"""``recalibrate``: the stored statistics of a model's batch norms, from a pass over data."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.overrides import TorchFunctionMode

from hvd_syncbn import population, renorm
from hvd_syncbn.population import Take, Vector, Words
from hvd_syncbn.running import WITHOUT_STATISTICS
from hvd_syncbn.torch_impl import ops, ranks
from hvd_syncbn.torch_impl.freeze import is_frozen
from hvd_syncbn.torch_impl.functional import check_input
from hvd_syncbn.torch_impl.module import BatchNorm, SyncBatchNorm

M = TypeVar("M", bound=nn.Module)
Forward = Callable[[Any, Any], Any]


def recalibrate(
    model: M,
    batches: Iterable[Any],
    *,
    estimator: str | None = None,
    forward: Forward | None = None,
    process_set: Any = None,
    init_affine: bool = False,
    progress: bool = True,
    layer_by_layer: bool = False,
) -> M:
    r"""Replaces the running statistics of a model's batch norms by those of data, each rank giving its shard.

    Every ``_BatchNorm`` with running statistics takes part: ``SyncBatchNorm``, ``nn.BatchNorm1d``, ``2d``, ``3d``, their
    subclasses; those that ``freeze_batchnorm`` has frozen do not. Ranks may have any number of batches of any size, also none.
    Nothing else of the model changes: neither modes, other buffers, ``num_batches_tracked`` nor PyTorch's random numbers. The
    pass is in evaluation mode (no dropout) and without gradients. See ``docs/recalibration.md``.

    Args:
        model: changed in place. Those of its layers take part that ``forward`` reaches.
        batches: this rank's: tensors, tuples or lists (the first element is the input) or mappings (keyword arguments, where
            ``model.forward`` takes such ones, else the input). They are moved to the model's device.
        estimator: ``"batches"`` for the means of the global batches' means and unbiased variances, as in Ioffe and Szegedy,
            2015, every layer normalising each batch (of all ranks together) by its own: right in one pass over shuffled
            batches, whatever the running statistics are. ``"pooled"`` for mean and unbiased variance of all values, the layers
            normalising by their running statistics meanwhile: right behind layers whose running statistics are right. None is
            ``"batches"``, with ``layer_by_layer`` and ``init_affine`` ``"pooled"``.
        forward: called as ``forward(model, batch)`` in place of all that, with the batch as it comes.
        process_set: the ranks that share the data, as in ``convert_sync_batchnorm``; None is all of them.
        init_affine: whether to set weight and bias to standard deviation and mean, too, so that every layer becomes the
            identity: for norms that were inserted into a trained network. They are the identity during the pass.
        progress: whether the first rank shows a bar where it takes more than a second.
        layer_by_layer: whether to repeat the pass, at most once for every layer, until the statistics are those of the inputs
            that the layers have in the recalibrated model: exact. Only with ``"pooled"``, and batches that can be read again.

    Returns:
        ``model``.

    Raises:
        TypeError: no model, or no iterable of batches.
        ValueError: no layer has running statistics (or all are frozen), no rank has a batch, one value per channel, an unknown
            estimator, ranks with different models. All of these, and what ``forward`` raises, on every rank, and the model is
            as it was.
        RuntimeError: neither Horovod nor torch.distributed is initialized; another rank failed.

    Example:
        >>> import horovod.torch as hvd, torch
        >>> from torch import nn
        >>> from hvd_syncbn.torch import recalibrate
        >>> hvd.init()
        >>> model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2))
        >>> batches = [torch.tensor([[1.0, 10.0], [2.0, 10.0]]), torch.tensor([[2.0, 10.0], [4.0, 10.0]])]
        >>> model = recalibrate(model, batches)
        >>> model[1].running_mean, model[1].running_var
        (tensor([ 2.2500, 10.0000]), tensor([1.2500, 0.0000]))
    """

    norms: list[_BatchNorm] = []

    def prepare() -> _Network:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module. Received: {type(model).__name__}")
        population.check_arguments(batches, estimator, forward, init_affine, layer_by_layer, (Tensor,))
        network = _Network(model, forward or _call, init_affine)
        norms.extend(network.modules)
        undo.enter_context(_undone(model, network.modules))
        return network

    with contextlib.ExitStack() as undo, torch.random.fork_rng(_gpus(model)), torch.no_grad():
        population.recalibrate(_Ranks(process_set), prepare, batches, estimator, init_affine, layer_by_layer, progress)
        for norm in norms:
            if isinstance(norm, SyncBatchNorm) and norm.renorm:
                stddev = norm.get_buffer("running_stddev")
                variance = norm.get_buffer("running_var").cpu().numpy()
                stddev.copy_(torch.from_numpy(renorm.stddev_of(variance, norm.eps)))
    return model


def _gpus(model: Any) -> list[int]:
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})


class _Ranks:
    def __init__(self, process_set: Any) -> None:
        self.group = ranks.find(process_set)
        self.size = self.group.size
        self.rank = self.group.ranks.index(self.group.rank)

    def gather(self, value: Any) -> list[Any]:
        return self.group.gather(value, "recalibrate")

    def sum(self, words: Words, name: str) -> Words:
        packet = torch.from_numpy(words)
        self.group.sum(packet, f"hvd_syncbn.{name}")
        return packet.numpy()


class _Network:
    def __init__(self, model: nn.Module, forward: Forward, init_affine: bool) -> None:
        self.model = model
        self.forward = forward
        self.init_affine = init_affine
        self.modules: list[_BatchNorm] = []
        self.layers: list[population.Layer] = []
        frozen = []
        for name, module in model.named_modules():
            if not isinstance(module, _BatchNorm):
                continue
            if isinstance(module, _LazyNormBase) and module.has_uninitialized_params():
                raise ValueError(
                    f"the lazy layer {name!r} has no channel count yet: run a batch through the model first. Received: {module}"
                )
            if module.running_mean is None or module.running_var is None:
                continue
            if is_frozen(module):
                frozen.append(name)
                continue
            if init_affine and (module.weight is None or module.bias is None):
                raise ValueError(f"init_affine needs layers with weight and bias. Received: layer {name!r}, {module}")
            self.modules.append(module)
            # As PyTorch's conventions have it, the running variance is unbiased; that of batch renormalization is not.
            unbiased = not (isinstance(module, SyncBatchNorm) and module.renorm)
            self.layers.append(population.Layer(name or type(module).__name__, module.num_features, module.eps, unbiased))
        if not self.modules:
            raise ValueError(
                "the model has no batch norm layer with running statistics to replace. "
                + (f"Received: frozen layers {frozen}" if frozen else f"Received: {type(model).__name__}")
            )
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        self.device = devices.pop() if len(devices) == 1 else None
        self.residuals: dict[int, Tensor] = {}

    def run(self, batch: Any, take: Take) -> None:
        if self.forward is _call:
            batch = _input(batch, self.device)
        self.residuals.clear()
        with _eagerly(), self._residuals_kept(), _Watch(self, take):
            self.forward(self.model, batch)

    @contextlib.contextmanager
    def _residuals_kept(self) -> Iterator[None]:
        """Takes the residuals of our layers out of their calls: the kernel adds one, which rounds less often than a step of its
        own, as evaluation has it."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = dict(kwargs)
            residual = args[1] if len(args) > 1 else given.pop("residual", None)
            if residual is not None:
                self.residuals[id(module)] = residual
            return args[:1], given

        hooks = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in self.modules if isinstance(m, BatchNorm)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def normalize(self, index: int, take: Take, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """What a watched layer makes of its input, by the kernels of training, whose bits do not depend on the layout."""
        layer = self.layers[index]
        residual = check_input(x, layer.channels, self.residuals.pop(id(self.modules[index]), None), None)
        packet = ops.forward_moments(x, layer.eps)
        reduced = take(index, packet.cpu().numpy())
        if self.init_affine:
            return x.clone() if residual is None else x + residual  # what comes next may work in place
        mean, var = self._tensors(index)[:2]
        y: Tensor
        if reduced is None:
            y, _ = ops.frozen_apply(x, mean, var, weight, bias, residual, layer.eps, False)
        else:
            packet = torch.from_numpy(reduced).to(x.device)
            settings = (*WITHOUT_STATISTICS, layer.eps, False, f"recalibrate.{layer.name}")
            y, _ = ops.forward_apply(x, packet, weight, bias, residual, *settings)
        return y

    def read(self, index: int) -> list[Vector]:
        return [_to_core(tensor) for tensor in self._tensors(index)]

    def write(self, index: int, vectors: Sequence[Vector]) -> None:
        for tensor, (array, _) in zip(self._tensors(index), vectors, strict=True):
            tensor.copy_(torch.from_numpy(array).view(tensor.dtype))

    def _tensors(self, index: int) -> list[Tensor]:
        module = self.modules[index]
        parameters = (module.weight, module.bias) if self.init_affine else ()
        return [tensor.detach() for tensor in (module.running_mean, module.running_var, *parameters) if tensor is not None]


def _to_core(tensor: Tensor) -> Vector:
    copy = tensor.cpu().clone(memory_format=torch.contiguous_format)
    return (copy.view(torch.uint16) if copy.itemsize == 2 else copy).numpy(), str(tensor.dtype).removeprefix("torch.")


class _Watch(TorchFunctionMode):
    """Takes the place of ``F.batch_norm`` where it is called with the running statistics of a watched layer.

    Every evaluation of a batch norm comes through there, whoever's subclass it is and whatever it does to its input before. A
    hook on the module would see only what the subclass gets.
    """

    def __init__(self, network: _Network, take: Take) -> None:
        super().__init__()
        self.network = network
        self.take = take
        self.watched = {id(module.running_mean): i for i, module in enumerate(network.modules)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            call = _BATCH_NORM.bind(*args, **kwargs).arguments
            index = self.watched.get(id(call["running_mean"]))
            if index is not None:
                return self.network.normalize(index, self.take, call["input"], call.get("weight"), call.get("bias"))
        return func(*args, **kwargs)


_BATCH_NORM = inspect.signature(F.batch_norm)


@contextlib.contextmanager
def _undone(model: nn.Module, watched: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode; afterwards all modes and buffers are as before."""
    # Not by train() and eval(), which a model may have made do more.
    own = {id(module) for module in watched}
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if id(module) not in own
    ]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            buffer.copy_(value)


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Without compiled code, which does not come through ``F.batch_norm``."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # PyTorch 2.6
    if set_stance is None or "torch._dynamo" not in sys.modules:
        yield
    else:
        with set_stance("force_eager"):
            yield


def _input(batch: Any, device: torch.device | None) -> Any:
    """The input in a batch, on the model's device."""
    found = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if isinstance(found, Mapping):
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in found.items()}
    if not isinstance(found, Tensor):
        raise TypeError(
            "expected batches of tensors, of tuples or lists that begin with one, or of mappings; for others pass `forward`. "
            f"Received: {type(batch).__name__}"
            + (f" beginning with {type(found).__name__}" if isinstance(batch, list | tuple) else "")
        )
    return found.to(device)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping) and _takes(type(model), tuple(batch)):
        return model(**batch)
    return model(batch)


def _takes(cls: type[nn.Module], names: tuple[str, ...]) -> bool:
    """Whether the model's forward has these keyword arguments."""
    try:
        inspect.signature(cls.forward).bind(None, **dict.fromkeys(names))
    except TypeError:
        return False
    return True
