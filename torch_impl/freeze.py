"""``freeze_batchnorm`` and its opposite: batch norms that use and keep their stored statistics in training, too.

A frozen layer is one that stays in evaluation mode: its ``train`` does nothing but remember. So it works for every class of
batch norm, and conversion, pickle and ``deepcopy`` need to know nothing of it.
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
    """In the place of a frozen layer's ``train``, as an attribute of the layer: pickle and ``deepcopy`` take it along."""

    def __init__(self, layer: nn.Module, affine: bool) -> None:
        self.layer = layer
        self.affine = affine
        self.learned = {name: p.requires_grad for name, p in layer.named_parameters(recurse=False)}

    def __call__(self, mode: bool = True) -> nn.Module:
        """``nn.Module.train``."""
        vars(self.layer)["_frozen_in_training"] = mode
        for child in self.layer.children():
            child.train(mode)
        return self.layer

    def begin(self) -> None:
        """Freezes the layer."""
        vars(self.layer).update(train=self, _frozen_affine=self.affine, _frozen_in_training=self.layer.training)
        self.layer.training = False
        for name in self.learned if not self.affine else ():
            parameter = self.layer.get_parameter(name)
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer would go on using it

    def end(self) -> None:
        """Gives back what was there."""
        attributes = vars(self.layer)
        del attributes["train"], attributes["_frozen_affine"]
        self.layer.training = attributes.pop("_frozen_in_training")
        for name, parameter in self.layer.named_parameters(recurse=False):
            if not self.affine and name in self.learned:
                parameter.requires_grad_(self.learned[name])


def freeze_batchnorm(model: Module, affine: bool = False) -> Module:
    """Makes every batch norm of a model use its stored statistics in training, too, and leave them as they are.

    That is what Caffe calls ``use_global_stats``, and what fine-tuning with small batches wants. Frozen layers send no
    collective: freeze them on every rank. They stay frozen through ``model.train()``, ``convert_sync_batchnorm`` and
    ``revert_sync_batchnorm``, ``copy.deepcopy``, ``pickle`` and ``torch.save(model)``. A ``state_dict`` stays that of
    ``nn.BatchNorm`` and so does not say it: freeze the model that it is loaded into.

    Freeze before the optimizer is made, or make it anew: Horovod's goes on averaging parameters that no longer learn.

    Args:
        model: changed in place. Its layers may be ``SyncBatchNorm``, ``nn.BatchNorm*``, ``nn.SyncBatchNorm``, Horovod's and
            subclasses of these.
        affine: whether gamma and beta go on learning. Otherwise they get no gradient (``requires_grad`` is False, their
        ``grad``
            None). In a ``SyncBatchNorm`` that holds whatever becomes of ``requires_grad`` later.

    Returns:
        ``model``.

    Raises:
        TypeError: not a ``torch.nn.Module``; ``affine`` is no bool.
        ValueError: a layer keeps no running statistics, or is lazy and has seen no batch. Nothing is changed then.

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
                f"the lazy layer {path!r} has no channel count yet: run a batch through the model before freezing it. "
                f"Received: {layer}"
            )
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(
                f"{path!r} keeps no running statistics (track_running_stats=False), so there is nothing to freeze it at. "
                f"Received: {layer}"
            )
    for layer in layers.values():
        _end(layer)
    # All are looked at before the first is changed: they may share a parameter.
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
    """Undoes ``freeze_batchnorm``: layers are in the model's mode again, and their parameters learn as they did before.

    Args:
        model: changed in place. Layers that are not frozen stay as they are.

    Returns:
        ``model``.

    Raises:
        TypeError: not a ``torch.nn.Module``.
    """
    for layer in _batch_norms(model).values():
        _end(layer)
    return model


def is_frozen(layer: nn.Module) -> bool:
    """Whether ``freeze_batchnorm`` froze this layer."""
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
