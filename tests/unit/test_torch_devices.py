"""Tensors on several devices, of which meta is the one that every machine has: an error that names them, never a result."""

from __future__ import annotations

import re
from collections.abc import Callable
from unittest import mock

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn

from hvd_syncbn import horovod
from hvd_syncbn.torch import (
    SyncBatchNorm,
    SyncBatchNorm2d,
    convert_sync_batchnorm,
    freeze_batchnorm,
    recalibrate,
    sync_batch_norm,
)
from tests.torch_tools import randn, randomize
from tests.unit.test_torch_convert import CallsFunction

X = randn(1, 4, 3, 5, 5)
ON_META = torch.ones(3, device="meta")


@pytest.fixture(scope="module", autouse=True)
def initialized_horovod() -> None:
    hvd.init()


def with_on_meta(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        tensor = getattr(layer, name)
        moved = tensor.detach().to("meta")
        setattr(layer, name, nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved)
    return layer


TENSORS = ("weight", "bias", "running_mean", "running_var")
MEMBERS = [(name,) for name in TENSORS] + [TENSORS, (*TENSORS, "num_batches_tracked"), ("num_batches_tracked",)]


def message(received: str) -> str:
    return rf"expected all tensors of (layer '\S+'|a layer) on one device\. Received: {re.escape(received)}\. Move them"


@pytest.mark.parametrize("names", MEMBERS, ids=" ".join)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_member_on_meta(names: tuple[str, ...], momentum: float | None, activation: str | None) -> None:
    layer = with_on_meta(SyncBatchNorm(3, momentum=momentum, activation=activation), *names)
    received = ", ".join(["input on cpu", *(f"{name} on meta" for name in names)])
    before = [buffer.clone() for buffer in layer.buffers() if not buffer.is_meta]
    with pytest.raises(ValueError, match=message(received)) as caught:
        layer(X)
    assert repr(layer.collective_name) in str(caught.value)
    after = [buffer for buffer in layer.buffers() if not buffer.is_meta]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("names", MEMBERS, ids=" ".join)
def test_a_member_of_a_frozen_layer_on_meta(names: tuple[str, ...]) -> None:
    layer = with_on_meta(freeze_batchnorm(SyncBatchNorm2d(3)).train(), *names)
    names = tuple(name for name in names if name in TENSORS)
    if not names:  # the counter, which a frozen layer does not use
        assert layer(X).isfinite().all()
        return
    with pytest.raises(ValueError, match=message(", ".join(["input on cpu", *(f"{name} on meta" for name in names)]))):
        layer(X)


@pytest.mark.parametrize("layer", [SyncBatchNorm2d(3), CallsFunction(3), freeze_batchnorm(SyncBatchNorm2d(3))], ids=repr)
def test_the_input_on_meta(layer: nn.Module) -> None:
    convert_sync_batchnorm(layer)
    with pytest.raises((ValueError, RuntimeError), match=r"on one device|is not on the expected device meta"):
        layer.train()(X.to("meta"))


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_a_residual_on_another_device(where: str, freeze: bool) -> None:
    layer = SyncBatchNorm(3, activation="relu", device=where).train()
    if freeze:
        freeze_batchnorm(layer).train()
    other = "meta" if where == "cpu" else "cpu"
    with pytest.raises((ValueError, RuntimeError), match=f"residual on {other}|{other} is not on the expected device {where}"):
        layer(X.to(where), residual=X.to(other))


@pytest.mark.parametrize("name", TENSORS)
def test_the_function(name: str) -> None:
    tensors = {label: torch.ones(3) for label in TENSORS} | {name: ON_META}
    with pytest.raises(ValueError, match=r"layer 'bn3'.*" + f"Received: input on cpu, {name} on meta"):
        sync_batch_norm(X, **tensors, name="bn3")
    with pytest.raises(ValueError, match="Received: input on cpu, residual on meta"):
        sync_batch_norm(X, None, None, residual=X.to("meta"))


def test_a_subclass_that_calls_the_function() -> None:
    layer = with_on_meta(convert_sync_batchnorm(nn.Sequential(CallsFunction(3)))[0], "running_mean")
    with pytest.raises(ValueError, match=r"layer 'Sequential.0'.*running_mean on meta"):
        layer(X)


def test_evaluation() -> None:
    """PyTorch's own check."""
    for name in TENSORS:
        layer = with_on_meta(SyncBatchNorm2d(3), name).eval()
        with pytest.raises(RuntimeError, match="meta is not on the expected device cpu"):
            layer(X)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_recalibrate(name: str) -> None:
    model = with_on_meta(SyncBatchNorm2d(3), name)
    with pytest.raises((ValueError, RuntimeError), match="on one device"):
        recalibrate(model, [X], progress=False)


def test_compiled() -> None:
    layer = with_on_meta(SyncBatchNorm2d(3), "weight")
    with pytest.raises(Exception, match=r"weight on meta|is not on the expected device"):
        torch.compile(layer, backend="aot_eager")(X)
    torch.compiler.reset()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: SyncBatchNorm2d(3),
    "converted": lambda: convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))[0],
    "average over all batches": lambda: SyncBatchNorm2d(3, momentum=None),
    "frozen": lambda: freeze_batchnorm(SyncBatchNorm2d(3)),
    "subclass": lambda: convert_sync_batchnorm(nn.Sequential(CallsFunction(3)))[0],
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("initialized", [True, False])
def test_everything_on_meta(kind: str, initialized: bool) -> None:
    """Shape inference, as torch.nn's: nothing is sent, and Horovod is not needed."""
    layer = LAYERS[kind]().to("meta").train()
    x = X.to("meta").to(memory_format=torch.channels_last).requires_grad_()
    with (
        mock.patch.object(hvd, "is_initialized", lambda: initialized),
        mock.patch.object(horovod, "size", lambda *_: 2),
        mock.patch.object(hvd, "allreduce_", side_effect=AssertionError),
    ):
        y = layer(x)
        y.sum().backward()
    want = nn.BatchNorm2d(3, device="meta")(X.to("meta").to(memory_format=torch.channels_last))
    assert isinstance(y, Tensor) and (y.device, y.shape, y.dtype, y.stride()) == (
        x.device,
        want.shape,
        want.dtype,
        want.stride(),
    )
    assert x.grad is not None and x.grad.is_meta


def test_from_meta_to_a_device() -> None:
    """What the message says to do."""
    layer, source = SyncBatchNorm2d(3, device="meta"), randomize(SyncBatchNorm2d(3))
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(layer(X), source(X))
