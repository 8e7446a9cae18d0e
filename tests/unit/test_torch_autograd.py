"""The PyTorch layer in one process under autograd: transforms, saved tensors, checkpointing, no gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from hvd_syncbn.torch import SyncBatchNorm, freeze_batchnorm
from tests import torch_second as second
from tests.torch_tools import (
    WEIGHTS,
    assert_close,
    assert_same,
    pair,
    randn,
    randomize,
    step,
)


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()
    assert hvd.size() == 1


@pytest.mark.parametrize("loss", second.LOSSES)
def test_a_loss_with_gradients_in_it(loss: str) -> None:
    second.check(loss, SyncBatchNorm, list(range(8)), 8, lambda tensor: tensor)


@pytest.mark.parametrize("freeze", [None, "statistics", "all"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2, 2)])
def test_second_derivatives(shape: tuple[int, ...], activation: str | None, freeze: str | None) -> None:
    """Of every input, by finite differences; the residual keeps the activation's kink away."""
    layer = randomize(SyncBatchNorm(3, activation=activation)).double()
    if freeze:
        freeze_batchnorm(layer, affine=freeze == "statistics")
    x, residual = (randn(seed, *shape, dtype=torch.float64) for seed in (1, 2))
    residual += 5 * residual.sign()
    if shape[2:]:
        x = x.contiguous(memory_format=torch.channels_last)
    given = {name: p.detach() for name, p in layer.named_parameters() if freeze != "all"}
    inputs = [t.requires_grad_() for t in (x, residual, *given.values())]

    def call(x: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, dict(zip(given, parameters, strict=True)), (x, residual))
        return y

    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_backward_pass_has_the_same_bytes(dtype: torch.dtype) -> None:
    layer = randomize(SyncBatchNorm(5, activation="relu"))
    x, residual, dy = (randn(seed, 4, 5, 6, dtype=dtype).requires_grad_() for seed in (1, 2, 3))
    inputs = [x, residual, *layer.parameters()]
    recorded, plain = (torch.autograd.grad(layer(x, residual), inputs, dy, create_graph=recorded) for recorded in (True, False))
    assert_same(dict(enumerate(g.detach() for g in recorded)), dict(enumerate(plain)))
    seconds = torch.autograd.grad([g.square().sum() for g in recorded], [x, dy, layer.weight])
    assert [g.dtype for g in seconds] == [dtype, dtype, torch.float32]


def test_meta_learning() -> None:
    """A step on fast weights, differentiated as a whole: `allow_unused` used to hide that the norm had no part in it."""

    def outer(norm: Callable[[int], nn.Module]) -> list[Tensor]:
        model = second.network(norm)
        x = randn(5, 6, 4, dtype=torch.float64)
        slow = dict(model.named_parameters())
        loss = torch.func.functional_call(model, slow, (x,)).square().sum()
        steps = torch.autograd.grad(loss, list(slow.values()), create_graph=True, allow_unused=True)
        fast = {name: p - 0.01 * step for (name, p), step in zip(slow.items(), steps, strict=True)}
        loss = torch.func.functional_call(model, fast, (2 * x.cos(),)).square().sum()
        return list(torch.autograd.grad(loss, list(slow.values()), allow_unused=True))

    for got, want in zip(outer(SyncBatchNorm), outer(second.Definition), strict=True):
        torch.testing.assert_close(got, want, **second.TOLERANCE)


TRANSFORMS: dict[str, Any] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x.expand(2, *x.shape)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(transform: str) -> None:
    """In training an error that names the layer, and nothing happened; in evaluation PyTorch's own result."""
    ours, theirs = pair((4, 5, 6))
    before = copy.deepcopy(ours.state_dict())
    x = randn(1, 4, 5, 6)
    with pytest.raises(RuntimeError, match=rf"torch\.func .*\.eval\(\) on layer '{ours.collective_name}'"):
        TRANSFORMS[transform](ours, x)
    assert_same(dict(ours.state_dict()), dict(before))
    assert_same(ours(x), copy.deepcopy(ours)(x))  # what was left behind would be noticed here
    ours.load_state_dict(before)
    got, want = (TRANSFORMS[transform](layer.eval(), x) for layer in (ours, theirs))
    assert_close(got, want, 1e-6)


def test_forward_mode() -> None:
    layer, x = SyncBatchNorm(5), randn(1, 4, 5, 6)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp is not implemented"):
        layer(forward_ad.make_dual(x, x))


def saved(layer: nn.Module, *inputs: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        kept_output = layer(*inputs)
    return [*kept, kept_output]


@pytest.mark.parametrize("activation", [None, "relu"])
def test_memory_kept_for_backward(activation: str | None) -> None:
    """Of the input's size: the input itself, and with relu the output itself. No copies, no residual."""
    x, residual = randn(1, 4, 5, 6).requires_grad_(), randn(2, 4, 5, 6).requires_grad_()
    *kept, y = saved(SyncBatchNorm(5, activation=activation), x, residual)
    of_input_size = {tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()}
    assert of_input_size == {x.data_ptr(), *([y.data_ptr()] if activation else [])}
    assert sum(tensor.numel() for tensor in kept if tensor.numel() < x.numel()) <= 3 * 5


def test_changed_in_place_is_noticed() -> None:
    """What backward reads must be what forward wrote."""
    layer = SyncBatchNorm(5, activation="relu")
    x = randn(1, 4, 5, 6).requires_grad_()
    y = layer(x)
    y.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()
    # Without an activation only the caller holds the output.
    want = step(SyncBatchNorm(5), x, torch.full((4, 5, 6), 2.0))
    layer = SyncBatchNorm(5)
    layer(x).mul_(2).sum().backward()
    assert_same(x.grad, want["dx"])


class Checkpointed(nn.Module):
    """Blocks that end in a norm, where early stopping stops, or go on after it."""

    def __init__(self, norms: list[nn.Module], ends: bool, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(norm, *([] if ends else [nn.Sigmoid()])) for norm in norms)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("reentrant", [True, False, None])
def test_checkpointing(reentrant: bool | None, momentum: float | None, blocks: int, ends: bool) -> None:
    """Statistics and counter of a batch that is seen twice are PyTorch's."""
    options = {"momentum": momentum, "dtype": torch.float64}
    ours = Checkpointed([SyncBatchNorm(3, **options) for _ in range(blocks)], ends, reentrant)
    theirs = Checkpointed([nn.BatchNorm1d(3, **options) for _ in range(blocks)], ends, reentrant)
    for seed, mean in enumerate((1, 5, 2)):
        x, dy = randn(seed, 6, 3, dtype=torch.float64) + mean, randn(seed + 3, 6, 3, dtype=torch.float64)
        got, want = step(ours, x, dy), step(theirs, x, dy)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=WEIGHTS if "running" in name else 1e-11, atol=WEIGHTS)
    assert theirs.blocks[-1][0].num_batches_tracked == (3 if reentrant is None else 6)


def test_checkpointing_example() -> None:
    """Batches of 1, 5 and 2 (+-1), each seen twice."""
    layer = SyncBatchNorm(1, momentum=None)
    for mean in (1.0, 5.0, 2.0):
        x = torch.tensor([[mean - 1], [mean + 1]]).requires_grad_()
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.num_batches_tracked == 6 and layer.running_mean.item() == pytest.approx(16 / 6, rel=1e-6)
    assert layer.running_var.item() == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    layer, x = SyncBatchNorm(5), randn(1, 4, 5, 6)
    want = step(SyncBatchNorm(5), x, x)
    with mode():
        y = layer(x)
    assert not y.requires_grad
    assert_same([y, *layer.buffers()], [want[name] for name in ("y", "running_mean", "running_var", "num_batches_tracked")])
