"""Batch norms that conversion does not reach are named by a warning, and nothing else is."""

from __future__ import annotations

import functools
import math
import types
import warnings
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvd_syncbn.torch
from hvd_syncbn.torch import SyncBatchNorm, convert_sync_batchnorm, freeze_batchnorm
from tests.torch_tools import randn, randomize, step

X, DY = randn(1, 6, 3, 7, 7), randn(2, 6, 3, 7, 7)


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()


normalized, native = F.batch_norm, torch.ops.aten.native_batch_norm
by_lambda = lambda x: F.batch_norm(x, None, None, training=True)  # noqa: E731


def by_function(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def through_another(x: Tensor) -> Tensor:
    return by_function(x) * 2


elsewhere = types.ModuleType("elsewhere")
vars(elsewhere)["normalize"] = by_function


class Helper:
    def norm(self, x: Tensor) -> Tensor:
        return by_function(x)


class Callable_:
    def __call__(self, x: Tensor) -> Tensor:
        return by_function(x)


class ByMethod(nn.Module):
    def norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class InheritsMethod(ByMethod):
    def forward(self, x: Tensor) -> Tensor:
        return super().norm(x)


class ByStaticMethod(nn.Module):
    @staticmethod
    def norm(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class ByAttribute(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class ByHelper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper()

    def forward(self, x: Tensor) -> Tensor:
        return self.helper.norm(x)


class ByProperty(nn.Module):
    @property
    def normalized(self) -> Callable[..., Tensor]:
        return functools.partial(F.batch_norm, running_mean=None, running_var=None, training=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x)


class InInnerFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return F.batch_norm(x, None, None, training=True)

        return inner(x)


class InComprehension(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.nn.functional.batch_norm(part, None, None, training=True) for part in x.chunk(2)])


def module_of(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return type("Made", (nn.Module,), {"forward": forward, "__module__": __name__})()


LOCAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "method": (ByMethod, "batch_norm"),
    "inherited method": (InheritsMethod, "batch_norm"),
    "static method": (ByStaticMethod, "batch_norm"),
    "property": (ByProperty, "batch_norm"),
    "inner function": (InInnerFunction, "batch_norm"),
    "comprehension": (InComprehension, "batch_norm"),
    "lambda": (lambda: ByAttribute(lambda x: F.batch_norm(x, None, None, training=True)), "batch_norm"),
    "partial": (
        lambda: ByAttribute(functools.partial(F.batch_norm, running_mean=None, running_var=None, training=True)),
        "batch_norm",
    ),
    "function in an attribute": (lambda: ByAttribute(by_function), "batch_norm"),
    "callable object": (lambda: ByAttribute(Callable_()), "batch_norm"),
    "method of an object": (ByHelper, "batch_norm"),
    "module-level lambda": (lambda: module_of(lambda self, x: by_lambda(x)), "batch_norm"),
    "module-level function": (lambda: module_of(lambda self, x: by_function(x)), "batch_norm"),
    "through two functions": (lambda: module_of(lambda self, x: through_another(x)), "batch_norm"),
    "another module's function": (lambda: module_of(lambda self, x: elsewhere.normalize(x)), "batch_norm"),
    "by another name": (lambda: module_of(lambda self, x: normalized(x, None, None, training=True)), "batch_norm"),
    "an operator by another name": (
        lambda: module_of(lambda self, x: native(x, None, None, None, None, True, 0.1, 1e-5)[0]),
        "native_batch_norm",
    ),
    "torch.batch_norm": (
        lambda: module_of(lambda self, x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)),
        "batch_norm",
    ),
    "torch.native_batch_norm": (
        lambda: module_of(lambda self, x: torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0]),
        "native_batch_norm",
    ),
    "torch.ops.aten": (
        lambda: module_of(
            lambda self, x: torch.ops.aten._native_batch_norm_legit.no_stats(x, None, None, True, 0.1, 1e-5)[0]
        ),
        "_native_batch_norm_legit",
    ),
    "torch.cudnn_batch_norm": (
        lambda: module_of(lambda self, x: torch.cudnn_batch_norm(x, x, None, None, None, True, 0.1, 1e-5)[0]),
        "cudnn_batch_norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOCAL)
def test_a_module_that_calls_a_function(kind: str) -> None:
    make, function = LOCAL[kind]
    model = nn.ModuleDict({"a": make(), "b": nn.BatchNorm2d(3)})
    if not function.startswith("cudnn"):
        assert model["a"](X).isfinite().all()  # a call that works
    with pytest.warns(UserWarning, match="module 'a' is left unchanged") as caught:
        convert_sync_batchnorm(model)
    (warning,) = caught
    text = str(warning.message)
    assert f"{type(model['a']).__name__} calls {function} and is not a torch.nn.BatchNorm" in text
    assert "does not synchronize its statistics. Use a torch.nn.BatchNorm there, or hvd_syncbn.torch.sync_batch_norm" in text
    assert warning.filename == __file__


def batch_norm(x: Tensor) -> Tensor:
    """Of that name alone."""
    return x * math.sqrt(2)


class Options:
    batch_norm = True
    use_batch_norm = True


OPTIONS = Options()


class HasOptions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.options = OPTIONS
        self.batch_norm = nn.BatchNorm2d(3)

    def unused(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)

    def forward(self, x: Tensor, options: Any = OPTIONS) -> Tensor:
        if self.options.batch_norm and options.batch_norm and OPTIONS.use_batch_norm:
            return self.batch_norm(x)
        return x


GOOD: dict[str, Callable[[], nn.Module]] = {
    "options and a layer of that name": HasOptions,
    "function of that name": lambda: nn.Sequential(nn.BatchNorm2d(3), module_of(lambda self, x: batch_norm(x))),
    "our function": lambda: nn.Sequential(
        nn.BatchNorm2d(3), module_of(lambda self, x: hvd_syncbn.torch.sync_batch_norm(x, None, None))
    ),
    "other functions": lambda: nn.Sequential(
        nn.BatchNorm2d(3), module_of(lambda self, x: F.layer_norm(F.instance_norm(x), x.shape))
    ),
    "isinstance": lambda: nn.Sequential(
        nn.BatchNorm2d(3), module_of(lambda self, x: x if isinstance(self, nn.BatchNorm2d) else x + 1)
    ),
}


@pytest.mark.parametrize("kind", GOOD)
def test_no_warning_without_reason(kind: str) -> None:
    model = GOOD[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_sync_batchnorm(model)(X)


class OfGraphs(nn.Module):
    """As torch_geometric.nn.BatchNorm is written."""

    def __init__(self, channels: int, allow_single_element: bool = False) -> None:
        super().__init__()
        self.module = nn.BatchNorm1d(channels)
        self.allow_single_element = allow_single_element

    def forward(self, x: Tensor) -> Tensor:
        if self.allow_single_element and x.size(0) <= 1:
            m = self.module
            return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)
        y: Tensor = self.module(x)
        return y


def test_a_module_around_a_norm() -> None:
    """The norm is converted, and that is said; what the path beside it does on one rank is said where it is taken."""
    model = nn.Sequential(OfGraphs(3), OfGraphs(3, allow_single_element=True))
    with pytest.warns(
        UserWarning, match=r"layer '1\.module' is converted, but '1' \(OfGraphs\) also calls batch_norm"
    ) as caught:
        convert_sync_batchnorm(model)
    (warning,) = caught
    assert "the other ranks wait" in str(warning.message) and "allow_single_element=False" in str(warning.message)
    assert all(isinstance(m.module, SyncBatchNorm) for m in model)


class InnerSuper(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return super(InnerSuper, self).forward(x)

        return inner(x) * 2


class InnerClass(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return (lambda x: nn.BatchNorm2d.forward(self, x))(x) * 2


class ByModuleFunction(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return normalize_by(self, x) * 2


def normalize_by(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training)


@pytest.mark.parametrize("cls", [InnerSuper, InnerClass, ByModuleFunction])
def test_a_subclass_whose_inner_function_normalizes(cls: type[nn.BatchNorm2d]) -> None:
    theirs = nn.Sequential(randomize(cls(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = convert_sync_batchnorm(nn.Sequential(randomize(cls(3))))
        got = step(ours, X, DY)
    assert isinstance(ours[0], SyncBatchNorm)
    torch.testing.assert_close(got, step(theirs, X, DY), rtol=1e-4, atol=1e-4)  # PyTorch's own float32 kernels


class ByOperator(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten._native_batch_norm_legit.no_stats(x, None, None, True, 0.1, 1e-5)[0]


class ByTwo(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.other(x)

    def other(self, x: Tensor) -> Tensor:
        return torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0]


@pytest.mark.parametrize(("cls", "name"), [(ByOperator, "_native_batch_norm_legit"), (ByTwo, "native_batch_norm")])
def test_a_subclass_that_calls_another_function(cls: type[nn.Module], name: str) -> None:
    with pytest.warns(UserWarning, match=f"layer '0' is left unchanged: {cls.__name__} calls {name}. hvd-syncbn does not"):
        model = convert_sync_batchnorm(nn.Sequential(cls(3)))
    assert type(model[0]) is cls


class Hidden(nn.BatchNorm2d):
    """The first step warns about a layer whose code does not show it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + getattr(torch, "native_" + "batch_norm")(x, None, None, None, None, True, 0.1, 1e-5)[0]


def test_a_subclass_that_turns_out_to_call_another_function() -> None:
    model = convert_sync_batchnorm(nn.Sequential(Hidden(3)))
    with pytest.warns(UserWarning, match="layer 'Sequential.0' uses the statistics of this rank only. It calls native_"):
        model(X)


class HasFrozenPart(nn.BatchNorm2d):
    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.inner = nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inner(x))


def test_a_frozen_part_is_not_taken_for_a_local_one() -> None:
    layer = convert_sync_batchnorm(HasFrozenPart(3))
    freeze_batchnorm(layer.inner).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(X)


def test_hooks() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    model[0].register_forward_hook(lambda layer, args, y: F.batch_norm(y, None, None, training=True))
    model[1].register_forward_hook(lambda layer, args, y: y * 2)
    with pytest.warns(UserWarning, match="hook of layer '0' is left unchanged: it calls batch_norm") as caught:
        convert_sync_batchnorm(model)
    assert len(caught) == 1
