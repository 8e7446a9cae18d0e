"""torch.compile and torch.export: one graph, no recompilation, the bytes of the eager layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn

from hvd_syncbn import horovod as hvd_syncbn_horovod
from hvd_syncbn.torch import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from hvd_syncbn.torch_impl import ops
from tests.torch_tools import LAYOUTS, assert_same, in_layout, randn, randomize, step
from tests.unit.test_torch_convert import CallsFunctionByMethod, Doubled, WithActivation

# PyTorch's compiler uses its own deprecated parts.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Model(nn.Module):
    """Every option once, and the layer's input as its own residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SyncBatchNorm(5, activation="relu", process_set=hvd.global_process_set)
        self.second = SyncBatchNorm(5, momentum=None)
        self.third = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(5, affine=False), nn.Sigmoid()))
        self.fourth = SyncBatchNorm(5, activation="relu", track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = self.second(y, residual=x)
        y = self.third(y)
        return self.fourth(y, residual=y)


def check(backend: str, batches: list[int], layout: str = "contiguous") -> int:
    """Trains a compiled model and its eager twin; returns how many graphs were compiled."""
    graphs = 0
    inner = torch._dynamo.lookup_backend(backend)

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return inner(graph, inputs)

    eager = randomize(Model())
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend=counting)
    for i, batch in enumerate(batches):
        x, dy = (in_layout(randn(seed, batch, 5, 4, 3), layout) for seed in (2 * i, 2 * i + 1))
        got, want = step(compiled, x, dy), step(eager, x, dy)
        # A compiled module's names have a prefix.
        assert_same({name.replace("_orig_mod.", ""): value for name, value in got.items()}, want, f"batch {i}:")
    assert twin.second.num_batches_tracked == len(batches)
    return graphs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_step_equals_eager(layout: str) -> None:
    """In bytes, running statistics too, with one graph for a batch size and one for all others."""
    assert check("aot_eager", [4, 6, 3, 7, 4, 9, 2, 8, 5, 10], layout) == 2


@pytest.mark.slow
def test_inductor() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = randomize(SyncBatchNorm(5, activation="relu"))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    eager, twin = Small(), Small()
    x, dy = randn(1, 4, 5, 4, 3), randn(2, 4, 5, 4, 3)
    got = step(torch.compile(twin, fullgraph=True, backend="inductor"), x, dy)
    assert_same({name.replace("_orig_mod.", ""): value for name, value in got.items()}, step(eager, x, dy))


def compiled_step(compiled: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): value for name, value in step(compiled, x, dy).items()}


@pytest.mark.parametrize("cls", [WithActivation, CallsFunctionByMethod, Doubled])
def test_subclass_with_a_forward_of_its_own(cls: type[nn.Module]) -> None:
    """Leading its F.batch_norm to the operator breaks no graph."""
    eager = convert_sync_batchnorm(nn.Sequential(randomize(cls(3))))
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x, dy = randn(seed, 4, 3, 5, 5), randn(seed + 2, 4, 3, 5, 5)
        assert_same(compiled_step(compiled, x, dy), step(eager, x, dy))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, WithActivation])
def test_converted_after_it_was_compiled(norm: type[nn.Module]) -> None:
    """And reverted again: the compiler looks at the class before it runs what it made for another."""
    eager = nn.Sequential(nn.Conv2d(3, 3, 1), randomize(norm(3)))
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend="aot_eager")
    x, dy = randn(1, 4, 3, 5, 5), randn(2, 4, 3, 5, 5)
    for change in (lambda module: module, convert_sync_batchnorm, revert_sync_batchnorm):
        change(eager), change(twin)
        assert_same(compiled_step(compiled, x, dy), step(eager, x, dy))


def test_autocast() -> None:
    def run(model: nn.Module) -> list[Tensor]:
        x = randn(1, 4, 3, 6, 6).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        y.backward(torch.ones_like(y))
        return [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]

    eager = nn.Sequential(nn.Conv2d(3, 5, 3), SyncBatchNorm(5, activation="relu"))
    twin = copy.deepcopy(eager)
    assert_same(run(torch.compile(twin, fullgraph=True, backend="aot_eager")), run(eager))


def test_errors_pass_through() -> None:
    """What only the packet can tell is told from inside the graph, too, and the layer's state is as before."""
    layer = randomize(SyncBatchNorm(5))
    mean = layer.running_mean.clone()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=f"more than 1 value per channel.*{layer.collective_name}"):
        compiled(torch.zeros(1, 5))
    assert_same(layer.running_mean, mean)
    assert layer.num_batches_tracked == 0


def test_exported_evaluation_is_plain_torch() -> None:
    model = randomize(Model()).eval()
    x = randn(1, 4, 5, 4, 3)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("batch_norm" in operator for operator in operators)
    assert not any("hvd_syncbn" in operator for operator in operators)
    for batch in (4, 7):
        x = randn(batch, batch, 5, 4, 3)
        assert_same(program.module()(x), model(x))


def packet_for(x: Tensor) -> Tensor:
    return ops.forward_moments(x, 1e-5)


INPUTS = {
    "2d": lambda: randn(1, 6, 3),
    "4d": lambda: randn(1, 4, 3, 5, 2),
    "channels last": lambda: in_layout(randn(1, 4, 3, 5, 2), "channels_last"),
    "channels last, one position": lambda: randn(1, 4, 3, 1, 1).to(memory_format=torch.channels_last),
    "channels last, one channel": lambda: randn(1, 4, 1, 5, 2).to(memory_format=torch.channels_last),
    "strided": lambda: randn(1, 4, 6, 5, 2)[:, ::2],
    "transposed": lambda: randn(1, 3, 6).t(),
    "empty": lambda: randn(1, 0, 3, 5),
    "float16": lambda: randn(1, 6, 3).half(),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_operators_are_registered_soundly(kind: str) -> None:
    """Shape functions agree with the operators, strides included, and so does what their schemas say they change."""
    x = INPUTS[kind]()
    packet, stats = packet_for(x), torch.ones(2, x.shape[1], dtype=torch.float64)
    vector = torch.ones(x.shape[1])
    tensors = (x, packet, vector, vector.clone(), x.clone(), vector.clone(), vector.clone())
    back, *_ = ops.backward_moments(x, x, x, stats, torch.float32)
    for operator, arguments in (
        (ops.forward_moments, (x, 1e-5, True)),
        (ops.forward_apply, (*tensors, None, 0.9, 0.1, True, True, 1e-5, True, "name")),
        (ops.forward_apply, (*tensors, torch.tensor(2), 0.0, None, True, False, 1e-5, True, "name")),
        (ops.backward_moments, (x, x.clone(), x.clone(), stats, torch.bfloat16)),
        (ops.backward_apply, (x, x.clone(), x.clone(), back, stats, vector, True, "name")),
        (ops.backward_apply, (x, x.clone(), None, back, stats, None, False, "name")),
        (ops.backward_check, (back, vector, vector.clone(), "name")),
        (torch.ops.hvd_syncbn.frozen_apply, (x, vector, vector.clone(), vector, None, x.clone(), 1e-5, True)),
        (torch.ops.hvd_syncbn.frozen_backward, (x, x.clone(), stats, vector, True)),
        (torch.ops.hvd_syncbn.frozen_backward, (x, None, stats, None, False)),
        (ops.allreduce_, (packet, "name", "horovod:0")),
        (ops.reduced_packet, (x, 1e-5, None, "name", True)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_collective_stays_out_of_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile knows by a tag; who captures one by hand is told. A stand-in for a packet on a GPU, which is not needed."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.hvd_syncbn.allreduce_.default.tags
    monkeypatch.setattr(hvd_syncbn_horovod, "size", lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"CUDA graph cannot hold the collective 'hvd_syncbn\.bn1\.forward'"):
        ops._allreduce_(SimpleNamespace(is_cuda=True), "hvd_syncbn.bn1.forward", "horovod:0")  # type: ignore[arg-type]
