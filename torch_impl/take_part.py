"""``take_part``: a rank without input for a layer takes part in the layer's collectives."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvd_syncbn import native
from hvd_syncbn.torch_impl import ops, ranks
from hvd_syncbn.torch_impl.module import SyncBatchNorm


def take_part(*modules: nn.Module) -> Tensor:
    """Takes part in a step of synchronized layers with an empty batch, in place of calling their modules.

    A rank that has no input for a part of the network (a detection head without proposals, a graph without edges) calls it
    where other ranks call the module; otherwise they wait for this rank. The results on the other ranks are those of their
    samples alone. Running statistics are updated here, too, so that all ranks keep the same ones. The result is 0: add it to
    the loss, so that this rank takes part in the backward pass. Call it at the same place of the step, and with gradients
    enabled if the others have them.

    Layers in evaluation mode and frozen layers have no collectives and are left out. No other code of the module runs: local
    batch norms, collectives of the user and hooks are not called. Over Horovod the order of the layers in a module does not
    matter. Collectives of torch.distributed have an order: layers take part in that of ``module.modules()``; if a module runs
    them in another order, pass its layers in that order.

    Args:
        modules: modules that contain ``SyncBatchNorm`` layers, or such layers, in the order in which other ranks run them;
            each as often as they run it.

    Returns:
        A scalar 0, float32, on the device of the modules' parameters. Its gradient by every parameter of the modules that
        requires one is 0, so optimizers that average gradients find one of each parameter on every rank.

    Raises:
        TypeError: an argument is not a ``torch.nn.Module``.
        ValueError: the ranks disagree about a layer, or their global batch holds one value per channel; on every rank.
        RuntimeError: training without an initialized Horovod or torch.distributed.

    Warns:
        UserWarning: a module contains no ``SyncBatchNorm``.

    Example:
        >>> import horovod.torch as hvd, torch
        >>> from hvd_syncbn.torch import SyncBatchNorm, take_part
        >>> hvd.init()
        >>> head = SyncBatchNorm(4)
        >>> boxes = torch.zeros(0, 4)
        >>> loss = head(boxes).square().sum() if len(boxes) else take_part(head)
        >>> loss.backward()
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected a torch.nn.Module. Received: {type(module).__name__}")
        if not any(isinstance(layer, SyncBatchNorm) for layer in module.modules()):
            warnings.warn(f"found no SyncBatchNorm that could take part. Received: {type(module).__name__}", stacklevel=2)
    zero: Tensor = _take_part(modules)
    return zero


@torch.compiler.disable
def _take_part(modules: Sequence[nn.Module]) -> Tensor:
    parameters = {parameter: None for module in modules for parameter in module.parameters()}  # an ordered set
    buffers = (buffer for module in modules for buffer in module.buffers())
    device = next((tensor.device for tensor in itertools.chain(parameters, buffers)), torch.device("cpu"))
    calls = []
    with torch.no_grad():
        for module in modules:
            norms = [layer for layer in module.modules() if isinstance(layer, SyncBatchNorm) and layer.training]
            layers = [_Layer(norm, device) for norm in norms]
            for layer, packet in zip(layers, _sum(layers, "forward"), strict=True):
                layer.module._take_statistics(packet)
            calls.append(layers)
    # The first input makes it differentiable where no parameter is.
    anchor = torch.zeros((), device=device, requires_grad=True)
    zero: Tensor = _Zero.apply(anchor, calls, *(parameter for parameter in parameters if parameter.requires_grad))
    return zero


class _Layer:
    """A layer that takes part in a step, with the group that it has then."""

    def __init__(self, module: SyncBatchNorm, device: torch.device) -> None:
        self.module = module
        self.group = ranks.find(module.process_set)
        statistics = module.weight if module.running_mean is None else module.running_mean
        self.device = device if statistics is None else statistics.device

    def packet(self) -> Tensor:
        """Return the packet of a rank that has joined, which fits any dtype of the other ranks' inputs."""
        return torch.zeros(native.packet_size(self.module.num_features), dtype=torch.int64, device=self.device)


def _sum(layers: Sequence[_Layer], direction: str) -> list[Tensor]:
    """Return the packets of all layers, summed over the ranks. All sums start before the first one is awaited."""
    packets = [layer.packet() for layer in layers]
    waits = [
        layer.group.start_sum(packet, f"hvd_syncbn.{layer.module.collective_name}.{direction}")
        for layer, packet in zip(layers, packets, strict=True)
    ]
    for wait in waits:
        wait()
    return packets


class _Zero(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, zero: Tensor, calls: Sequence[Sequence[_Layer]], *parameters: Tensor) -> Tensor:
        ctx.calls, ctx.parameters = calls, parameters
        return zero.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        for layers in reversed(ctx.calls):
            layers = layers[::-1]
            for layer, packet in zip(layers, _sum(layers, "backward"), strict=True):
                nothing = torch.zeros(layer.module.num_features, device=packet.device)
                ops.backward_check(packet, nothing, nothing.clone(), layer.module.collective_name)
        return None, None, *map(torch.zeros_like, ctx.parameters)
