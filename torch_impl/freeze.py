"""``freeze_batchnorm`` and ``unfreeze_batchnorm``: batch norms that use their stored statistics in training, too.

A frozen layer stays in evaluation mode: its ``train`` only stores the requested mode. This works for every class of batch norm
and needs no support in conversion, pickle or ``deepcopy``.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from hvd_syncbn.torch_impl.convert import _own_normalization
from hvd_syncbn.torch_impl.module import SyncBatchNorm

Module = TypeVar("Module", bound=nn.Module)


class _StaysInEvaluation:
    """Replaces the ``train`` of a frozen layer as an attribute of the layer, so that pickle and ``deepcopy`` copy it."""

    def __init__(self, layer: nn.Module, affine: bool) -> None:
        self.layer = layer
        self.affine = affine
        self.learned = {name: p.requires_grad for name, p in layer.named_parameters(recurse=False)}

    def __call__(self, mode: bool = True) -> nn.Module:
        """Store the mode, as a replacement of ``nn.Module.train``."""
        vars(self.layer)["_frozen_in_training"] = mode
        for child in self.layer.children():
            child.train(mode)
        return self.layer

    def begin(self) -> None:
        """Freeze the layer."""
        vars(self.layer).update(train=self, _frozen_affine=self.affine, _frozen_in_training=self.layer.training)
        self.layer.training = False
        for name in self.learned if not self.affine else ():
            parameter = self.layer.get_parameter(name)
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer would otherwise apply it in every step

    def end(self) -> None:
        """Restore the layer."""
        attributes = vars(self.layer)
        del attributes["train"], attributes["_frozen_affine"]
        self.layer.training = attributes.pop("_frozen_in_training")
        for name, parameter in self.layer.named_parameters(recurse=False):
            if not self.affine and name in self.learned:
                parameter.requires_grad_(self.learned[name])


def freeze_batchnorm(model: Module, affine: bool = False) -> Module:
    """Make every batch norm of a model use its stored statistics in training, too, without updating them.

    Useful for fine-tuning with small batches; Caffe calls it ``use_global_stats``. Frozen layers send no collective, so freeze
    them on every rank. They stay frozen through ``model.train()``, ``convert_sync_batchnorm`` and ``revert_sync_batchnorm``,
    ``copy.deepcopy``, ``pickle`` and ``torch.save(model)``. A ``state_dict`` has no entry for it, because it is compatible with
    ``nn.BatchNorm``: freeze the model that it is loaded into.

    Create the optimizer after freezing; Horovod's optimizer keeps averaging parameters that no longer learn.

    Args:
        model: changed in place. Its layers may be ``SyncBatchNorm``, ``nn.BatchNorm*``, ``nn.SyncBatchNorm``, Horovod's and
            subclasses of these.
        affine: whether gamma and beta keep learning. Otherwise they get no gradient: ``requires_grad`` is False and ``grad`` is
            None. In a ``SyncBatchNorm`` this holds even if ``requires_grad`` is set later.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``; ``affine`` is not a bool.
        ValueError: a layer keeps no running statistics, or is lazy and has seen no batch. The model is then unchanged.

    Example:
        >>> from torch import nn
        >>> from hvd_syncbn.torch import freeze_batchnorm, unfreeze_batchnorm
        >>> model = freeze_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).train()
        >>> model.training, model[1].training, model[1].weight.requires_grad
        (True, False, False)
        >>> model = unfreeze_batchnorm(model)
        >>> model[1].training, model[1].weight.requires_grad
        (True, True)
    """
    if not isinstance(affine, bool):
        raise TypeError(f"expected a bool for affine. Received: {affine!r}")
    layers = _batch_norms(model)
    for path, layer in layers.items():
        if isinstance(layer, _LazyNormBase):
            raise ValueError(
                f"the lazy layer {path!r} has no channel count yet. First run a batch through the model, then freeze it. "
                f"Received: {layer}"
            )
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(
                f"{path!r} keeps no running statistics (track_running_stats=False), so it cannot be frozen. Received: {layer}"
            )
    for layer in layers.values():
        _end(layer)
    # Read all layers before changing the first one, because they may share a parameter.
    for frozen in [_StaysInEvaluation(layer, affine) for layer in layers.values()]:
        frozen.begin()
    for path, layer in layers.items():
        if not isinstance(layer, SyncBatchNorm) and _own_normalization(type(layer)):
            warnings.warn(
                f"layer {path!r} is kept in evaluation mode, but its class normalizes by itself. Check its forward. "
                f"Received: {type(layer).__name__}",
                stacklevel=2,
            )
    return model


def unfreeze_batchnorm(model: Module) -> Module:
    """Undo ``freeze_batchnorm``: restore the layers' mode and the ``requires_grad`` of their parameters.

    Args:
        model: changed in place. Layers that are not frozen are left unchanged.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    for layer in _batch_norms(model).values():
        _end(layer)
    return model


def is_frozen(layer: nn.Module) -> bool:
    """Return whether ``freeze_batchnorm`` froze this layer."""
    return isinstance(vars(layer).get("train"), _StaysInEvaluation)


def _end(layer: nn.Module) -> None:
    frozen = vars(layer).get("train")
    if isinstance(frozen, _StaysInEvaluation):
        frozen.end()


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module. Received: {type(model).__name__}")
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    if not layers:
        warnings.warn(f"found no batch norm. Received: {type(model).__name__}", stacklevel=3)
    return layers
