"""A converted subclass of which autograd runs parts again in backward: synchronized there, too, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import horovod.torch as hvd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_syncbn.torch import SyncBatchNorm2d, convert_sync_batchnorm
from hvd_syncbn.torch_impl import functional
from tests.torch_tools import assert_same, randn, randomize, step

X, DY = randn(1, 4, 3, 5, 5), randn(2, 4, 3, 5, 5)


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Recomputes(nn.BatchNorm2d):
    """Half of the input to its norm, and that in a part that runs again in backward."""

    reentrant = False

    def normalize(self, x: Tensor) -> Tensor:
        return F.batch_norm(x / 2, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)

    def part(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) * 2


class ByMethod(Recomputes):
    def part(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.normalize, x, use_reentrant=self.reentrant)
        return y


class ByInnerFunction(Recomputes):
    def part(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return self.normalize(x)

        y: Tensor = checkpoint(inner, x, use_reentrant=self.reentrant)
        return y


class ByOverriddenMethod(ByMethod):
    def normalize(self, x: Tensor) -> Tensor:
        return super().normalize(x) + 0


class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx: Any, *dy: Any) -> Any:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = ctx.function(x)
        y.backward(dy[0])
        return x.grad, None


class ByAutogradFunction(Recomputes):
    def part(self, x: Tensor) -> Tensor:
        y: Tensor = Again.apply(x, self.normalize)
        return y


class Once(Recomputes):
    def part(self, x: Tensor) -> Tensor:
        return self.normalize(x)


class ByHook(Once):
    """In a hook of the output: the gradient is that of a function of x, once more normalized."""

    def part(self, x: Tensor) -> Tensor:
        y = self.normalize(x)
        y.register_hook(lambda dy: dy + F.batch_norm(x.detach(), None, None, training=True))
        return y


class ByHookOfMethod(Once):
    def part(self, x: Tensor) -> Tensor:
        y = self.normalize(x)
        y.register_hook(lambda dy: dy + self.normalize(x.detach()))
        return y


class WithoutGradient(Once):
    """A part that is never run again is not taken for one that is."""

    def part(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autograd.graph.save_on_cpu():
            z = F.batch_norm(x, None, None, training=True)
        with torch.autograd.graph.save_on_cpu():
            return self.normalize(x) + z


class EvaluatesAgain(Once):
    """What runs again needs no other rank."""

    def part(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, training=False)

        y: Tensor = checkpoint(inner, x, use_reentrant=self.reentrant)
        return self.normalize(x) + y


def trained(model: nn.Module, x: Tensor = X) -> tuple[dict[str, Tensor], int]:
    """Two steps: the results of the last, and how many normalizations were synchronized in both."""
    with mock.patch.object(functional, "normalize", wraps=functional.normalize) as ours:
        for _ in range(2):
            got = step(model, x, DY)
    return {name.replace("_orig_mod.", ""): value for name, value in got.items()}, ours.call_count


def converted(cls: type[Recomputes], reentrant: bool) -> nn.Sequential:
    layer = randomize(cls(3))
    layer.reentrant = reentrant
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return convert_sync_batchnorm(nn.Sequential(layer))


CASES = [
    (ByMethod, True),
    (ByMethod, False),
    (ByInnerFunction, True),
    (ByInnerFunction, False),
    (ByOverriddenMethod, True),
    (ByOverriddenMethod, False),
    (ByAutogradFunction, False),
]


@pytest.mark.parametrize(("cls", "reentrant"), CASES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_part_runs_again(cls: type[Recomputes], reentrant: bool, compiled: bool) -> None:
    """Each time over all ranks, with the bytes of a layer that runs nothing again. Statistics count twice, as in PyTorch."""
    model = converted(cls, reentrant)
    runs = torch.compile(model, backend="aot_eager") if compiled else model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, calls = trained(runs)
    assert calls == 4
    want, calls = trained(converted(Once, reentrant))
    assert calls == 2
    statistics = {"0.running_mean", "0.running_var"}
    assert statistics < got.keys()
    assert_same({name: got[name] for name in got.keys() - statistics}, {name: want[name] for name in want.keys() - statistics})
    four_times = converted(Once, reentrant)
    trained(four_times), trained(four_times)
    assert_same({name: got[name] for name in statistics}, {name: four_times.state_dict()[name] for name in statistics})


@pytest.mark.parametrize(("cls", "calls"), [(ByHook, 4), (ByHookOfMethod, 4), (WithoutGradient, 4), (EvaluatesAgain, 2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_and_contexts(cls: type[Recomputes], calls: int, compiled: bool) -> None:
    model = converted(cls, False)
    runs = torch.compile(model, backend="aot_eager") if compiled else model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, count = trained(model)
    assert count == calls
    twin = converted(cls, False)
    if compiled:
        got = {name.replace("_orig_mod.", ""): value for name, value in step(runs, X, DY).items()}
        trained(twin)
        assert_same(got, step(twin, X, DY))
    want, _ = trained(nn.Sequential(randomize(cls(3))))
    if not compiled:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # PyTorch's own float32 kernels


def test_a_layer_in_a_checkpoint_with_a_hook() -> None:
    """The hook runs outside of the checkpoint that it was registered in."""
    model = converted(ByHook, False)
    y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=False)
    y.backward(DY)
    want = step(converted(ByHook, False), X, DY)
    assert_same(y.detach(), want["y"])
    assert_same(model[0].weight.grad, want["d0.weight"])


class ByLambda(Recomputes):
    def part(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)

        y: Tensor = checkpoint(inner, x, use_reentrant=self.reentrant)
        return y


def by_function(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training)


class ByModuleFunction(Recomputes):
    def part(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(by_function, x, self, use_reentrant=self.reentrant)
        return y


class ByStaticMethod(Recomputes):
    @staticmethod
    def static(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)

    def part(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.static, x, use_reentrant=self.reentrant)
        return y


class OfFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class ByFunctionOfAutograd(Recomputes):
    def part(self, x: Tensor) -> Tensor:
        y: Tensor = OfFunction.apply(x)
        return y


@pytest.mark.parametrize("cls", [ByLambda, ByModuleFunction, ByStaticMethod, ByFunctionOfAutograd])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_refused(cls: type[Recomputes], reentrant: bool, compiled: bool) -> None:
    """Before anything is sent, and with what to do."""
    model = converted(cls, reentrant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs = torch.compile(model, backend="aot_eager") if compiled else model
    want = (
        "layer 'Sequential.0' calls F.batch_norm inside a checkpoint or an autograd.Function.*"
        f"Move the call to a method of {cls.__name__}"
    )
    with (
        mock.patch.object(functional, "normalize", side_effect=AssertionError),
        pytest.raises(RuntimeError, match=want),
    ):
        runs(X.clone().requires_grad_())
    assert_same(dict(model.state_dict()), before)
    model.eval()(X)


def test_refused_in_one_graph() -> None:
    """The compiler would trace the checkpointed part without the redirection."""
    compiled = torch.compile(converted(ByMethod, False), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"parts of Recomputes.forward run in the backward pass"):
        compiled(X.clone().requires_grad_())


class LocalBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *dy: Any) -> Any:
        return F.batch_norm(dy[0], None, None, training=True)


class WithLocalBackward(Once):
    def part(self, x: Tensor) -> Tensor:
        y: Tensor = LocalBackward.apply(self.normalize(x))
        return y


def test_a_backward_that_is_local() -> None:
    with pytest.warns(UserWarning, match=r"layer '0' is converted, but LocalBackward\.backward calls a batch norm function"):
        model = convert_sync_batchnorm(nn.Sequential(WithLocalBackward(3)))
    assert isinstance(model[0], WithLocalBackward) and type(model[0]) is not WithLocalBackward


class Block(nn.Module):
    """A layer in a compiled checkpoint."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = norm

    def part(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.part, x, use_reentrant=False)
        return y


@pytest.mark.parametrize("norm", [SyncBatchNorm2d, Once])
def test_compiled_checkpoint(norm: type[nn.Module]) -> None:
    """The eager bytes; statistics count once, as with torch.nn's layer there."""
    eager, twin = (convert_sync_batchnorm(randomize(Block(norm(3)))) for _ in range(2))
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=norm is SyncBatchNorm2d)
    got, want = (step(model, X, DY) for model in (compiled, eager))
    for name in ("y", "dx"):
        assert_same(got[name], want[name])


def test_compiled_checkpoint_with_recomputation() -> None:
    """PyTorch's error, not another result, where the compiler recomputes; what docs/pytorch.md says to do instead works."""
    model = randomize(Block(SyncBatchNorm2d(3)))
    compiled = torch.compile(model, backend="aot_eager_decomp_partition")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        compiled(X.clone().requires_grad_()).backward(DY)
    inside = torch.compile(randomize(Block(SyncBatchNorm2d(3))).part, backend="aot_eager_decomp_partition", fullgraph=True)
    got, want = X.clone().requires_grad_(), X.clone().requires_grad_()
    checkpoint(inside, got, use_reentrant=False).backward(DY)
    randomize(Block(SyncBatchNorm2d(3)))(want).backward(DY)
    assert_same(got.grad, want.grad)
