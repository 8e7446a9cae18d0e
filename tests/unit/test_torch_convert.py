"""Conversion of models to SyncBatchNorm and back: what is kept, what is left alone, what survives copying."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import horovod.torch as hvd
import pytest
import torch
import torch.nn.functional as F
from horovod.torch.sync_batch_norm import SyncBatchNorm as HorovodSyncBatchNorm
from torch import Tensor, nn
from torch.nn.utils import parametrize

import hvd_syncbn.torch
from hvd_syncbn.torch import (
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)
from hvd_syncbn.torch_impl import functional, module
from tests.torch_tools import assert_same, randn, randomize, step


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()


def unchanged(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(method)
    def wrapper(*args: Any) -> Tensor:
        return method(*args)

    return wrapper


class Doubled(nn.BatchNorm2d):
    """A user-defined subclass with attributes, one of them with a name that SyncBatchNorm uses, and `super().forward`."""

    def __init__(self, features: int, scale: float = 2.0) -> None:
        super().__init__(features)
        self.scale = scale
        self.activation = nn.LeakyReLU(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.scale * super().forward(x))


class Named(Doubled):
    """A subclass of a subclass, with a string for an activation."""

    def __init__(self, features: int) -> None:
        nn.BatchNorm2d.__init__(self, features)
        self.scale = 3.0
        self.activation = "relu"

    @unchanged
    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * super(Doubled, self).forward(x)
        return F.relu(y - 1) if self.activation == "relu" else y


class Model(nn.Module):
    """Every kind of layer in every kind of place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleDict({"a": nn.ModuleList([nn.BatchNorm2d(4), Doubled(4)])})
        self.twice = nn.BatchNorm2d(4)
        self.again = self.twice
        self.named = Named(4)
        self.head = nn.Linear(4, 3)
        self.last = nn.BatchNorm1d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks["a"]:
            x = block(x)
        x = self.named(self.again(self.twice(x) + 1))
        return self.last(self.head(x.mean((2, 3))))


PATHS = {
    "stem.1": nn.BatchNorm2d,
    "blocks.a.0": nn.BatchNorm2d,
    "blocks.a.1": Doubled,
    "twice": nn.BatchNorm2d,
    "named": Named,
    "last": nn.BatchNorm1d,
}
MADE = {nn.BatchNorm1d: SyncBatchNorm1d, nn.BatchNorm2d: SyncBatchNorm2d, nn.BatchNorm3d: SyncBatchNorm3d}


def model() -> Model:
    torch.manual_seed(0)
    return randomize(Model())


X = randn(1, 6, 3, 7, 7)
DY = randn(2, 6, 3)
DY_IMAGES = randn(3, 6, 3, 7, 7)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}


def assert_is_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    """One training step of each; the tolerance is PyTorch's float32 rounding, through seven layers."""
    torch.testing.assert_close(step(ours, X, DY), step(theirs, X, DY), rtol=1e-4, atol=1e-4)


def test_whole_model() -> None:
    converted = convert_sync_batchnorm(model())
    for path, cls in PATHS.items():
        layer = converted.get_submodule(path)
        assert isinstance(layer, SyncBatchNorm)
        assert layer.collective_name == f"Model.{path}"
        assert isinstance(layer, cls) and type(layer) is MADE.get(cls, type(layer))
    assert sum(isinstance(layer, SyncBatchNorm) for layer in converted.modules()) == len(PATHS)
    assert_is_same_model(converted, model())


def everything(module: nn.Module) -> dict[str, Any]:
    """What a model's layers are and hold: classes and attributes, by path, in their order."""
    return {
        path: [
            type(layer),
            [(name, value if isinstance(value, nn.Module) else id(value)) for name, value in vars(layer).items()],
        ]
        for path, layer in module.named_modules(remove_duplicate=False)
    }


def test_the_same_objects() -> None:
    original = model()
    original.stem[1].weight.requires_grad_(False)
    original.blocks["a"][1].eval()
    layers, before_all = dict(original.named_modules(remove_duplicate=False)), everything(original)
    before, children = tensors(original), [name for name, _ in original.named_modules(remove_duplicate=False)]
    for change in (convert_sync_batchnorm, revert_sync_batchnorm):
        changed = change(original)
        assert changed is original
        now = dict(changed.named_modules(remove_duplicate=False))
        assert now.keys() == layers.keys() and all(now[path] is layers[path] for path in layers)
        after = tensors(changed)
        assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
        assert [name for name, _ in changed.named_modules(remove_duplicate=False)] == children
        assert changed.twice is changed.again
        assert not changed.stem[1].weight.requires_grad and changed.stem[1].bias.requires_grad
        assert not changed.blocks["a"][1].training and changed.stem[1].training
    assert everything(original) == before_all


def test_containers_hold_the_converted_layer() -> None:
    """Plain lists and dictionaries of layers, and the way people find their norms."""
    original = model()
    shadow = {path: layer for path, layer in original.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    frozen = [original.stem[1], original.last]
    convert_sync_batchnorm(original)
    assert all(isinstance(layer, SyncBatchNorm) for layer in (*shadow.values(), *frozen))
    assert {path: layer for path, layer in original.named_modules() if isinstance(layer, nn.BatchNorm2d)} == shadow
    for layer in frozen:
        layer.eval()
    before = {path: layer.running_mean.clone() for path, layer in original.named_modules() if isinstance(layer, SyncBatchNorm)}
    original(X)
    stayed = {path for path in before if torch.equal(before[path], original.get_submodule(path).running_mean)}
    assert stayed == {"stem.1", "last"}


def test_parameters_without_weight_decay() -> None:
    """Chosen by class before or after the conversion: the same ones."""

    def chosen(module: nn.Module) -> list[int]:
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return [id(p) for layer in module.modules() if isinstance(layer, norms) for p in layer.parameters(recurse=False)]

    original = model()
    want = chosen(original)
    assert len(want) == 10 and chosen(convert_sync_batchnorm(original)) == want


def test_optimizer_made_before() -> None:
    original = model()
    optimizer = torch.optim.SGD(original.parameters(), lr=0.1)
    reference = model()
    their_optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    convert_sync_batchnorm(original)
    for trained, by in ((original, optimizer), (reference, their_optimizer)):
        trained(X).backward(DY)
        by.step()
    # As in assert_is_same_model; a step changes parameters by about 1.
    torch.testing.assert_close(dict(original.state_dict()), dict(reference.state_dict()), rtol=1e-4, atol=1e-4)
    assert not torch.equal(original.twice.weight, model().twice.weight)


def test_back_and_forth() -> None:
    original = model()
    before = everything(original)
    state = copy.deepcopy(original.state_dict())
    reverted = revert_sync_batchnorm(convert_sync_batchnorm(convert_sync_batchnorm(original)))
    assert everything(reverted) == before
    assert_same(dict(reverted.state_dict()), dict(state))
    assert_same(step(reverted, X, DY), step(model(), X, DY))


def test_hooks() -> None:
    calls: list[str] = []
    original = nn.Sequential(nn.BatchNorm2d(3))
    handles = [
        original[0].register_forward_pre_hook(lambda *_: calls.append("before")),
        original[0].register_forward_hook(lambda *_: calls.append("forward")),
        original[0].register_full_backward_hook(lambda *_: calls.append("backward")),
        original[0].register_state_dict_post_hook(lambda *_: calls.append("state")),
    ]

    def run(change: Callable[[nn.Module], nn.Module]) -> list[str]:
        calls.clear()
        layer = change(original)[0]
        layer(X.clone().requires_grad_()).sum().backward()
        layer.state_dict()
        return list(calls)

    assert run(convert_sync_batchnorm) == ["before", "forward", "backward", "state"]
    assert isinstance(original[0], SyncBatchNorm)
    handles[1].remove()  # taken before the conversion, good after it
    assert run(convert_sync_batchnorm) == ["before", "backward", "state"]
    late = original[0].register_forward_hook(lambda *_: calls.append("late"))
    assert run(revert_sync_batchnorm) == ["before", "late", "backward", "state"]
    late.remove()
    handles[0].remove()
    assert run(revert_sync_batchnorm) == ["backward", "state"]


def test_root() -> None:
    for cls, shape in ((nn.BatchNorm1d, (4, 3)), (nn.BatchNorm2d, (4, 3, 5, 5)), (nn.BatchNorm3d, (4, 3, 2, 2, 5))):
        original = randomize(cls(3))
        converted = convert_sync_batchnorm(original)
        assert converted is original and type(converted) is MADE[cls] and isinstance(converted, cls)
        assert converted.collective_name == cls.__name__
        x = randn(1, *shape)
        torch.testing.assert_close(converted(x), randomize(cls(3))(x), rtol=1e-5, atol=1e-5)
        assert type(revert_sync_batchnorm(converted)) is cls


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.ReLU(), nn.Sequential()], ids=repr)
def test_nothing_to_convert(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match=f"nothing to convert.*Received: {type(model).__name__}"):
        assert convert_sync_batchnorm(model) is model
    assert revert_sync_batchnorm(model) is model


@pytest.mark.parametrize(
    "thing", [None, [nn.BatchNorm2d(3)], {"a": nn.BatchNorm2d(3)}, nn.BatchNorm2d, torch.zeros(3)], ids=type
)
@pytest.mark.parametrize("change", [convert_sync_batchnorm, SyncBatchNorm.convert_sync_batchnorm, revert_sync_batchnorm])
def test_no_module(change: Callable[..., Any], thing: Any) -> None:
    with pytest.raises(TypeError, match=rf"expected a torch\.nn\.Module\. Received: .*{type(thing).__name__}"):
        change(thing)


def test_process_set_and_converting_twice() -> None:
    ranks = hvd.ProcessSet([0])
    converted = convert_sync_batchnorm(model(), process_set=ranks)
    layers = [layer for layer in converted.modules() if isinstance(layer, SyncBatchNorm)]
    assert len(layers) == len(PATHS) and all(layer.process_set is ranks for layer in layers)
    # Again, for all ranks, as a part of something larger.
    outer = SyncBatchNorm.convert_sync_batchnorm(nn.ModuleDict({"net": converted}))
    again = [layer for layer in outer.modules() if isinstance(layer, SyncBatchNorm)]
    assert all(new is old for new, old in zip(again, layers, strict=True))
    assert all(layer.process_set is None for layer in again)
    assert {layer.collective_name for layer in again} == {f"ModuleDict.net.{path}" for path in PATHS}
    assert_is_same_model(outer["net"], model())


def test_other_synchronized_layers() -> None:
    original = nn.Sequential(nn.SyncBatchNorm(3), HorovodSyncBatchNorm(3))
    before = everything(original)
    converted = convert_sync_batchnorm(original)
    assert [type(layer) for layer in converted] == [SyncBatchNorm] * 2
    want = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    torch.testing.assert_close(converted(X), want(X), rtol=1e-5, atol=1e-5)
    converted.load_state_dict(want.state_dict())
    assert everything(revert_sync_batchnorm(converted)) == before


@pytest.mark.parametrize("made", [SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d])
def test_revert_a_layer_of_given_dimensions_made_by_hand(made: type[SyncBatchNorm]) -> None:
    (cls,) = (cls for cls in MADE if MADE[cls] is made)
    layer = made(3, momentum=None)
    assert isinstance(layer, cls) and repr(layer) == repr(cls(3, momentum=None)).replace("BatchNorm", "SyncBatchNorm")
    assert type(revert_sync_batchnorm(layer)) is cls and vars(layer).keys() == vars(cls(3)).keys()
    with_relu = made(3, activation="relu")
    assert "activation=relu" in repr(revert_sync_batchnorm(with_relu)) and not isinstance(with_relu, SyncBatchNorm)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str)
def test_revert_a_layer_made_by_hand(options: dict[str, Any], activation: str | None) -> None:
    """It becomes PyTorch's batch norm, then the addition, then the activation: those bytes."""

    def separate(x: Tensor, residual: Tensor) -> Tensor:
        y = reference(x) + residual
        return F.relu(y) if activation else y

    reference = randomize(nn.BatchNorm2d(3, **options))
    layer = revert_sync_batchnorm(randomize(SyncBatchNorm(3, activation=activation, **options)))
    assert not isinstance(layer, SyncBatchNorm) and ("activation=relu" in repr(layer)) == (activation == "relu")
    for seed in range(3):
        x, residual = randn(seed, 4, 3, 5, 5), randn(seed + 7, 4, 3, 5, 5)
        assert_same(layer(x, residual), separate(x, residual))
    assert_same(dict(layer.state_dict()), dict(reference.state_dict()))
    reference.eval(), layer.eval()
    assert_same(layer(x, residual), separate(x, residual))
    # And to where it came from.
    again = convert_sync_batchnorm(layer)
    assert type(again) is SyncBatchNorm and again.activation == activation


def by_function(self: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class CallsFunction(nn.BatchNorm2d):
    forward = by_function


class CallsFunctionByMethod(nn.BatchNorm2d):
    """In another method, by its other name."""

    def normalize(self, x: Tensor) -> Tensor:
        running = self.running_mean, self.running_var
        return torch.batch_norm(x, self.weight, self.bias, *running, True, momentum=0.1, eps=1e-5, cudnn_enabled=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if not self.training else self.normalize(x)


class CallsFunctionBehindDecorator(nn.BatchNorm2d):
    @unchanged
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return F.batch_norm(input=x, running_mean=None, running_var=None, training=True, momentum=0.3)


class Inherits(CallsFunctionByMethod):
    pass


class CallsClassByName(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x) if self.training else super().forward(x)


class WithActivation(nn.BatchNorm2d):
    """As in image libraries: a call of the function, then dropout and an activation of any kind."""

    def __init__(self, features: int, momentum: float | None = 0.1) -> None:
        super().__init__(features, momentum=momentum)
        self.drop = nn.Identity()
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4 dimensions")
        share = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                share = 1.0 / float(self.num_batches_tracked)
        by_batch = True if self.training else self.running_mean is None and self.running_var is None
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            by_batch,
            share,
            self.eps,
        )
        return self.act(self.drop(x))


class OnlyRenamed(nn.BatchNorm2d):
    """Inherits its forward."""

    def extra_repr(self) -> str:
        return "mine, " + super().extra_repr()


CONVERTED = [
    CallsFunction,
    CallsFunctionByMethod,
    CallsFunctionBehindDecorator,
    Inherits,
    CallsClassByName,
    WithActivation,
    Doubled,
    Named,
    OnlyRenamed,
]


@pytest.mark.parametrize("cls", CONVERTED)
def test_subclass_that_calls_the_function(cls: Any) -> None:
    """What its own forward gives, by our operator: once a step, with statistics and counter as it keeps them."""
    original = nn.Sequential(nn.Conv2d(3, 3, 1), randomize(cls(3)))
    theirs = copy.deepcopy(original)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = convert_sync_batchnorm(original)
    assert isinstance(ours[1], SyncBatchNorm) and isinstance(ours[1], cls) and ours[1].collective_name == "Sequential.1"
    for seed in range(2):
        x, dy = randn(seed, 6, 3, 7, 7), randn(seed + 2, 6, 3, 7, 7)
        with (
            mock.patch.object(functional, "normalize", wraps=functional.normalize) as by_function,
            mock.patch.object(module, "normalize", wraps=module.normalize) as by_super,
        ):
            got = step(ours, x, dy)
        (call,) = by_function.call_args_list + by_super.call_args_list
        assert [argument for argument in call.args if isinstance(argument, str)] == ["Sequential.1"]
        torch.testing.assert_close(got, step(theirs, x, dy), rtol=1e-4, atol=1e-4)  # as assert_is_same_model
    ours.eval(), theirs.eval()
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours(x), theirs(x))
    if cls not in (Doubled, Named):  # their second forward is in a base class
        assert_same(copy.deepcopy(ours).train()(x), saved_and_loaded(ours).train()(x))
    assert type(revert_sync_batchnorm(ours)[1]) is cls


@pytest.mark.parametrize("momentum", [0.1, None])
def test_example_of_images(momentum: float | None) -> None:
    """The same bytes as a layer that is constructed directly, if both compute the same."""
    theirs = convert_sync_batchnorm(randomize(WithActivation(3, momentum)))
    ours = nn.Sequential(randomize(SyncBatchNorm(3, momentum=momentum)), nn.SiLU())
    for seed in range(3):
        got = step(theirs, randn(seed, 6, 3, 7, 7), DY_IMAGES)
        want = step(ours, randn(seed, 6, 3, 7, 7), DY_IMAGES)
        assert_same(got, {name.replace("0.", ""): value for name, value in want.items()})


class ByHand(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((0, 2, 3), keepdim=True)

    def extra_repr(self) -> str:
        return super().extra_repr()


class OfTheirSync(nn.SyncBatchNorm):
    """`super().forward` is that of torch.nn.SyncBatchNorm, whatever it is mixed with."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class CallsOther(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.native_batch_norm(x, self.weight, self.bias, None, None, True, 0.1, 1e-5)[0]


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (ByHand, "ByHand calls neither super().forward nor F.batch_norm. hvd-syncbn does not synchronize its statistics. Call"),
        (OfTheirSync, "its base class torch.nn.modules.batchnorm.SyncBatchNorm synchronizes by itself"),
        (CallsOther, "CallsOther calls native_batch_norm. "),
    ],
)
def test_subclass_that_normalizes_by_itself(cls: type[nn.Module], reason: str) -> None:
    original = nn.Sequential(nn.BatchNorm2d(3), cls(3))
    with pytest.warns(UserWarning, match=r"layer '1' is left unchanged: ") as caught:
        converted = convert_sync_batchnorm(original)
    assert len(caught) == 1 and reason in str(caught[0].message)
    assert type(converted[1]) is cls and type(converted[0]) is SyncBatchNorm2d


class ByHandInTraining(nn.BatchNorm2d):
    """Its code does not show it."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((0, 2, 3), keepdim=True) if self.training else super().forward(x)


def test_subclass_that_turns_out_to_normalize_by_itself() -> None:
    layer = convert_sync_batchnorm(nn.Sequential(ByHandInTraining(3)))
    with pytest.warns(UserWarning, match=r"layer 'Sequential\.0' uses the statistics of this rank only\. It calls neither"):
        layer(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.eval()(X)


class NormOfItsOwn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class AttributeOfThatName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(x)


class Hiding(nn.Module):
    """Norms in plain containers: one that is registered as well, one in evaluation mode, one that trains unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.BatchNorm2d(3)
        self.known = {"a": [self.seen]}
        self.teacher = [nn.Sequential(nn.BatchNorm2d(3)).eval()]
        self.unseen = {"b": (nn.Sequential(nn.BatchNorm2d(3)),)}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_what_is_out_of_reach() -> None:
    """All other parts of a model that would silently use statistics of this rank."""
    original = nn.ModuleDict(
        {
            "scripted": torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))),
            "traced": torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(3), NormOfItsOwn())),
            "own": NormOfItsOwn(),
            "attribute": AttributeOfThatName(),
            "hiding": Hiding(),
        }
    )
    with pytest.warns(UserWarning, match="is left unchanged") as caught:
        convert_sync_batchnorm(original)
    texts = [str(warning.message) for warning in caught]
    for what, fragment in (
        ("layer 'scripted.0'", "compiled by TorchScript"),
        ("operation 'traced.batch_norm'", "traced graph"),
        ("module 'own'", "NormOfItsOwn calls batch_norm"),
        ("layer 'hiding.unseen'", "plain list or dictionary"),
    ):
        (text,) = (text for text in texts if text.startswith(f"{what} is left unchanged: "))
        assert fragment in text and "does not synchronize its statistics" in text
    assert len(texts) == 4
    converted = {path for path, layer in original.named_modules() if isinstance(layer, SyncBatchNorm)}
    assert converted == {"traced.0", "attribute.batch_norm", "hiding.seen"}


class HasProcessSet(nn.BatchNorm2d):
    process_set = None


def test_names_that_are_taken() -> None:
    """Attributes of a user-defined class are not overwritten; a forward on the object would hide ours."""
    original = nn.Sequential(HasProcessSet(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    original[1].activation = "mine"
    original[2].forward = original[2].forward
    before = everything(original)
    with pytest.warns(UserWarning, match="is left unchanged") as caught:
        convert_sync_batchnorm(original)
    for warning, fragment in zip(caught, ("attribute 'process_set'", "attribute 'activation'", "replaced on"), strict=True):
        assert fragment in str(warning.message) and warning.filename == __file__
    assert everything(original) == before


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrized(when: str) -> None:
    """Parametrizations of before and after the conversion can be removed in either state."""
    layers, reference = [], randomize(nn.BatchNorm2d(3))
    for removed in ("converted", "reverted", "never"):
        layer = randomize(nn.BatchNorm2d(3))
        if when == "after":
            convert_sync_batchnorm(layer)
        parametrize.register_parametrization(layer, "weight", Halved(), unsafe=True)
        given = type(layer)
        convert_sync_batchnorm(layer)
        assert isinstance(layer, SyncBatchNorm2d) and parametrize.type_before_parametrizations(layer) is SyncBatchNorm2d
        got = step(layer, X, X)
        twin = copy.deepcopy(layer)
        assert_same(step(twin, X, X)["y"], got["y"])
        if removed == "converted":
            parametrize.remove_parametrizations(layer, "weight")
            assert type(layer) is SyncBatchNorm2d
        revert_sync_batchnorm(layer)
        if removed == "reverted":
            parametrize.remove_parametrizations(layer, "weight")
        if removed == "never":
            assert isinstance(layer, nn.BatchNorm2d) and not isinstance(layer, SyncBatchNorm)
            assert parametrize.is_parametrized(layer) and (type(layer) is given or when == "after")
        else:
            assert type(layer) is nn.BatchNorm2d
        layers.append(layer.eval())
    with torch.no_grad():
        reference.weight /= 2
    want = step(reference, X, X)
    torch.testing.assert_close([got["y"], got["dx"]], [want["y"], want["dx"]], rtol=1e-5, atol=1e-5)
    assert_same(layers[0](X), layers[1](X))
    assert_same(layers[0](X), layers[2](X))


def test_no_warning_without_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_sync_batchnorm(model())


def test_lazy() -> None:
    lazy = nn.Sequential(OrderedDict({"0": nn.Conv2d(3, 4, 3), "1": nn.Sequential(OrderedDict(norm=nn.LazyBatchNorm2d()))}))
    lazy.append(nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"'1\.norm'.*run a batch through.*Received: LazyBatchNorm2d"):
        convert_sync_batchnorm(lazy)
    assert type(lazy[2]) is nn.BatchNorm2d  # nothing is changed
    lazy(X)
    assert type(convert_sync_batchnorm(lazy)[1].norm) is SyncBatchNorm2d


def saved_and_loaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, saved_and_loaded, lambda module: pickle.loads(pickle.dumps(module))]


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "torch.save", "pickle"])
def test_copies(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    original = convert_sync_batchnorm(model(), process_set=hvd.global_process_set)
    other = duplicate(original)
    for path in PATHS:
        layer, twin = original.get_submodule(path), other.get_submodule(path)
        assert type(twin) is type(layer) and twin is not layer
        assert twin.collective_name == f"Model.{path}" and twin.process_set.ranks == layer.process_set.ranks
        assert all(a is not b for a, b in zip(twin.parameters(), layer.parameters(), strict=True))
    assert other.twice is other.again
    assert_same(step(other, X, DY), step(original, X, DY))
    for path, cls in PATHS.items():
        assert type(revert_sync_batchnorm(other).get_submodule(path)) is cls


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "torch.save", "pickle"])
def test_copies_of_a_layer_made_by_hand(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    layer = randomize(SyncBatchNorm(3, eps=0.1, momentum=None, activation="relu"))
    other = duplicate(layer)
    assert repr(other) == repr(layer) and other.collective_name == layer.collective_name
    assert_same(step(other, X, X), step(layer, X, X))


class Guarded(nn.BatchNorm2d):
    """A subclass that defines what to pickle."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.cache = lambda: None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "cache"}


def test_subclass_with_a_state_of_its_own() -> None:
    other = saved_and_loaded(convert_sync_batchnorm(randomize(Guarded(3))))
    assert isinstance(other, Guarded) and isinstance(other, SyncBatchNorm) and not hasattr(other, "cache")
    assert_same(step(other, X, X), step(randomize(SyncBatchNorm(3)), X, X))


def test_names_of_layers_made_by_hand() -> None:
    """Made in the same order, named alike: by class and a counter."""
    first, second = SyncBatchNorm(3), SyncBatchNorm(3)
    number = int(first.collective_name.removeprefix("SyncBatchNorm"))
    assert second.collective_name == f"SyncBatchNorm{number + 1}"


def test_converted_2d_still_checks_its_input() -> None:
    """Where a class is kept, so is what it accepts."""
    for layer, dims, wrong in (
        (Doubled(3), "4D", 2),
        (nn.BatchNorm1d(3), "2D or 3D", 4),
        (nn.BatchNorm2d(3), "4D", 3),
        (nn.BatchNorm3d(3), "5D", 4),
    ):
        for mode in (True, False):
            with pytest.raises(ValueError, match=f"expected {dims} input"):
                convert_sync_batchnorm(layer).train(mode)(torch.zeros(3, 3, 3, 3)[(0,) * (4 - wrong)])


def test_docs_name_tests_that_there_are() -> None:
    """docs/pytorch.md has a test behind each row of its table."""
    root = Path(__file__).parents[2]
    text = (root / "docs/pytorch.md").read_text()
    table = text[text.index("## What works with what") : text.index("## Limits")]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20 and all("::test_" in row or "check_" in row for row in rows)
    parallel = "".join(path.read_text() for path in (root / "tests/parallel/checks").glob("torch*.py"))
    file = ""
    for name, test, check in re.findall(r"`(test_torch_\w+\.py)?::(test_\w+)`|`(check_\w+)`", text):
        file = name or file
        if check and not hasattr(hvd_syncbn.torch, check):
            assert f"def {check}(" in parallel, check
        elif test:
            assert f"def {test}(" in (root / "tests/unit" / file).read_text(), (file, test)
