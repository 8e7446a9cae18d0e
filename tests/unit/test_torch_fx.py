"""Symbolic tracing (torch.fx) and what builds on it: the layers are leaves, as torch.nn's are, before and after revert."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import (
    QuantWrapper,
    convert,
    get_default_qat_qconfig_mapping,
    get_default_qconfig,
    get_default_qconfig_mapping,
    prepare,
)
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx, prepare_qat_fx

from hvd_syncbn.torch import SyncBatchNorm, SyncBatchNorm2d, convert_sync_batchnorm, revert_sync_batchnorm
from tests.torch_tools import assert_same, randn, randomize, step
from tests.unit.test_torch_convert import Doubled, WithActivation

# PyTorch announces for years that its quantization moves to another package.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.ao"),
]


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()


class Block(nn.Module):
    """The norm gets the block's input as its residual where it takes one."""

    def __init__(self, norm: nn.Module, fused: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = norm
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y, residual=x) if self.fused else torch.relu(self.norm(y) + x)


def converted(norm: nn.Module) -> nn.Module:
    return convert_sync_batchnorm(randomize(Block(norm)))


def reverted(model: nn.Module) -> nn.Module:
    return revert_sync_batchnorm(model)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "converted": lambda: converted(nn.BatchNorm2d(3)),
    "converted subclass": lambda: converted(Doubled(3)),
    "converted subclass that calls F.batch_norm": lambda: converted(WithActivation(3)),
    "converted and reverted": lambda: reverted(converted(nn.BatchNorm2d(3))),
    "by hand": lambda: randomize(Block(SyncBatchNorm(3, activation="relu"), fused=True)),
    "by hand, 2d": lambda: randomize(Block(SyncBatchNorm2d(3, momentum=None))),
    "by hand, in a process set": lambda: randomize(Block(SyncBatchNorm(3, process_set=hvd.global_process_set))),
    "by hand, reverted": lambda: reverted(randomize(Block(SyncBatchNorm(3, activation="relu"), fused=True))),
    "by hand, 2d, reverted": lambda: reverted(randomize(Block(SyncBatchNorm2d(3, momentum=None)))),
}
X, DY = randn(1, 4, 3, 6, 6), randn(2, 4, 3, 6, 6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_symbolic_trace(kind: str, training: bool) -> None:
    """One node, by the layer's path. The traced model trains and evaluates as the model does, whatever its mode was."""
    model = MODELS[kind]().train(training)
    twin = copy.deepcopy(model)
    graph = fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes if node.target == "norm"] == ["call_module"]
    assert graph.norm is model.norm
    assert not any("batch_norm" in str(node.target) for node in graph.graph.nodes)
    for mode in (True, False):
        graph.train(mode), twin.train(mode)
        assert_same(step(graph, X, DY), step(twin, X, DY))


def test_as_the_root() -> None:
    """A tracer looks into its root. The layer's mode is part of such a graph, as that of torch's functions is."""
    for make in (SyncBatchNorm, lambda n: revert_sync_batchnorm(SyncBatchNorm(n))):
        for training in (True, False):
            layer = randomize(make(3)).train(training)
            twin = copy.deepcopy(layer)
            graph = fx.symbolic_trace(layer)
            assert_same(dict(layer.named_buffers()), dict(twin.named_buffers()))  # tracing runs nothing
            got, want = step(graph, X, DY), step(twin, X, DY)
            assert_same(got, {name: want[name] for name in got})  # a graph has the buffers that it uses
            assert {"y", "dx", "dweight", "dbias", "running_mean", "running_var"} <= got.keys()
            assert ("num_batches_tracked" in got) == training


class PathTracer(fx.Tracer):
    """As image libraries extract features: a tracer of their own that knows the path of every node, and leaves of their own."""

    def __init__(self) -> None:
        super().__init__(autowrap_modules=())
        self.path = ""
        self.paths: dict[fx.Node, str] = {}

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, self.path = self.path, self.path_of_module(m)
        try:
            if not self.is_leaf_module(m, self.path):
                return forward(*args, **kwargs)
            return self.create_proxy("call_module", self.path, args, kwargs)
        finally:
            self.path = before

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        self.paths[proxy.node] = self.path
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Softmax) or super().is_leaf_module(m, module_qualified_name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_feature_extraction(kind: str, training: bool) -> None:
    model = nn.Sequential(MODELS[kind](), nn.Softmax(1)).train(training)
    twin = copy.deepcopy(model)
    tracer = PathTracer()
    graph = tracer.trace(model)
    (node,) = (node for node, path in tracer.paths.items() if path == "0.norm")
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = ({"0.norm": node},)
    extractor = fx.GraphModule(model, graph)
    extractor.graph.eliminate_dead_code()
    extractor.recompile()
    features = extractor(X)["0.norm"]
    want: list[Tensor] = []
    twin[0].norm.register_forward_hook(lambda module, args, y: want.append(y))
    twin(X)
    assert_same(features, want[0])


# --- Quantization -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_prepare_qat_after_conversion(kind: str) -> None:
    """It traces and trains; the layer stays what it is beside a convolution with fake quantization."""
    model = MODELS[kind]()
    synchronized = isinstance(model.norm, SyncBatchNorm)
    prepared = prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (X,))
    if synchronized:
        assert isinstance(prepared.norm, SyncBatchNorm)
        assert prepared.norm.collective_name == model.norm.collective_name
    twin = revert_sync_batchnorm(copy.deepcopy(prepared))
    got, want = step(prepared, X, DY), step(twin, X, DY)
    assert sum(name.endswith("num_batches_tracked") and value == 1 for name, value in got.items()) == 1
    for name, value in want.items():
        # Fake quantization rounds to one of 255 steps of a range of about 10, and what lies between two may go either way.
        torch.testing.assert_close(got[name].float(), value.float(), rtol=0.02, atol=0.1)
        assert name not in ("y", "dx") or (got[name] - value).abs().mean() < 1e-3


class Plain(nn.Module):
    """What every quantizer fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


def test_qat_prepared_before_conversion() -> None:
    """The convolution is fused with its norm then; the norm inside is converted, and reverted before int8."""
    mapping = get_default_qat_qconfig_mapping("x86")
    prepared, theirs = (prepare_qat_fx(randomize(Plain()).train(), mapping, (X,)) for _ in range(2))
    convert_sync_batchnorm(prepared)
    (norm,) = (module for module in prepared.modules() if isinstance(module, SyncBatchNorm))
    for seed in range(3):
        x, dy = randn(seed, 4, 3, 6, 6), randn(seed + 5, 4, 3, 6, 6)
        got, want = step(prepared, x, dy), step(theirs, x, dy)
        # Fake quantization rounds to 1 of 255 steps of a range of about 8, and a value that lies between two may go either way.
        torch.testing.assert_close(got["y"], want["y"], rtol=0, atol=0.1)
        assert (got["y"] - want["y"]).abs().mean() < 1e-3
    torch.testing.assert_close(norm.running_mean, theirs.conv.bn.running_mean, rtol=1e-4, atol=1e-4)
    assert norm.num_batches_tracked == theirs.conv.bn.num_batches_tracked == 3
    ours_int8, theirs_int8 = (convert_fx(revert_sync_batchnorm(model).eval()) for model in (prepared, theirs))
    assert "Quantized" in str(ours_int8)
    assert (ours_int8(X) - theirs_int8(X)).abs().max() <= 0.1


def test_int8_without_revert() -> None:
    """Fusing and converting to int8 go by exact classes. What comes out must not fail in a kernel that says nothing of us."""
    model = convert_sync_batchnorm(randomize(Plain())).eval()
    layer = model.norm
    int8 = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
    for module in (layer, randomize(SyncBatchNorm(3)).eval(), convert_sync_batchnorm(Doubled(3)).eval()):
        with pytest.raises(TypeError, match=r"revert_sync_batchnorm.*Received: torch\.quint8"):
            module(int8)
    # In a network, by PyTorch's eager quantization: nothing looks at the norm before the first batch does.
    eager = QuantWrapper(convert_sync_batchnorm(randomize(Plain()))).eval()
    eager.qconfig = get_default_qconfig("x86")
    prepared = prepare(eager)
    prepared(X)
    with pytest.raises(TypeError, match=r"revert_sync_batchnorm.*Received: torch\.quint8"):
        convert(prepared)(X)
    # With revert everything goes as if the model had never been converted.
    mapping = get_default_qconfig_mapping("x86")
    results = []
    for prepared in (
        prepare_fx(revert_sync_batchnorm(model), mapping, (X,)),
        prepare_fx(randomize(Plain()).eval(), mapping, (X,)),
    ):
        prepared(X)
        results.append(convert_fx(prepared)(X))
    assert_same(*results)


def test_fuse_for_inference() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fused = fuse_fx(revert_sync_batchnorm(convert_sync_batchnorm(randomize(Plain()))).eval())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(X), randomize(Plain()).eval()(X), rtol=1e-4, atol=1e-4)  # another order of rounding
