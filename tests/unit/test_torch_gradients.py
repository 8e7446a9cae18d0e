"""What a layer says of gradients in its forward packet, and that its backward packet is sent whatever is wanted of it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hvd_syncbn import protocol
from hvd_syncbn.torch import SyncBatchNorm, sync_batch_norm
from hvd_syncbn.torch_impl import ops
from tests.torch_tools import assert_same, randn

# PyTorch's compiler uses its own deprecated parts.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()


class Told(TorchDispatchMode):
    """Notes what forward packets are told of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.flags: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.hvd_syncbn.forward_moments.default:
            self.flags.append(bool(args[2] & 1) if len(args) > 2 else False)
        return func(*args, **(kwargs or {}))


def flags(run: Callable[[], Any]) -> list[bool]:
    with Told() as told:
        run()
    return told.flags


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_packets_have_the_digests_of_the_reference(needs_gradient: bool) -> None:
    x = randn(1, 4, 5, 6)
    number = protocol.call_number("layer", needs_gradient)
    packet = ops.forward_moments(x, 1e-3, number - 2**64 if number >= 2**63 else number)
    digest = protocol.forward_digest(1e-3, "float32", 5, number)
    assert packet[:4].tolist() == protocol.Packet(1, 24, (digest, digest**2), [], [], []).words()
    stats = torch.randn(2, 5, dtype=torch.float64)
    packet, *_ = ops.backward_moments(x, x, None, stats, torch.float32)
    digest = protocol.backward_digest([protocol.Statistics(m, 0.0, i) for m, i in stats.T.tolist()])
    assert packet[:4].tolist() == protocol.Packet(1, 24, (digest, digest**2), [], [], []).words()


def test_a_forward_packet_tells_whether_autograd_will_come_back() -> None:
    values = [randn(1, 4, 5, 6), randn(2, 5), randn(3, 5), randn(4, 4, 5, 6)]
    for wanted in itertools.product((False, True), repeat=4):
        x, weight, bias, residual = (value.clone().requires_grad_(w) for value, w in zip(values, wanted, strict=True))

        def run() -> Tensor:
            return sync_batch_norm(x, None, None, weight, bias, residual=residual)  # noqa: B023

        assert flags(run) == [any(wanted)] == [run().requires_grad]
        with torch.no_grad():
            assert flags(run) == [False]


def test_checkpointing() -> None:
    layer, x = SyncBatchNorm(5), randn(1, 4, 5, 6).requires_grad_()
    for reentrant, want in ((True, [False, True]), (False, [True, True])):
        assert flags(lambda r=reentrant: checkpoint(layer, x, use_reentrant=r).sum().backward()) == want


@contextlib.contextmanager
def graphs() -> Iterator[tuple[Any, dict[str, torch.fx.Graph]]]:
    """A backend, and the graphs that it gets, by direction."""
    found: dict[str, torch.fx.Graph] = {}

    def keep(direction: str) -> Any:
        def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
            found[direction] = module.graph
            return make_boxed_func(module)

        return compiler

    torch.compiler.reset()
    yield aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"), inference_compiler=keep("inference")), found
    torch.compiler.reset()


def uses(graph: torch.fx.Graph, name: str) -> list[torch.fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and name in f"{n.target} {n.args} {n.kwargs}"]


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=4) if any(w)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_compiled_graph_keeps_the_collective(activation: str | None, wanted: tuple[bool, ...]) -> None:
    """Whatever it is differentiated for: x, weight, bias, residual. The gradients are the eager ones."""
    values, dy = [randn(1, 4, 5, 6), randn(2, 5), randn(3, 5), randn(4, 4, 5, 6)], randn(5, 4, 5, 6)

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return sync_batch_norm(x, None, None, weight, bias, residual=residual, activation=activation)

    def gradients(function: Callable[..., Tensor]) -> list[Tensor | None]:
        tensors = [value.clone().requires_grad_(w) for value, w in zip(values, wanted, strict=True)]
        function(*tensors).backward(dy)
        return [tensor.grad for tensor in tensors]

    with graphs() as (backend, found):
        got = gradients(torch.compile(run, fullgraph=True, backend=backend))
    for a, b in zip(got, gradients(run), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same(a, b)
    assert len(uses(found["backward"], "sync_batch_norm.backward")) >= 1, found["backward"]
    assert len([n for n in uses(found["backward"], "hvd_syncbn.allreduce_")]) == 1, found["backward"]
    (moments,) = uses(found["forward"], "hvd_syncbn.forward_moments")
    assert moments.args[2] & 1


def test_a_graph_without_gradients_says_so() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = SyncBatchNorm(5), SyncBatchNorm(5)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.first(x)
            return self.second(y)

    for wrap, direction, want in (
        (contextlib.nullcontext, "forward", [False, True]),
        (torch.no_grad, "inference", [False, False]),
    ):
        with graphs() as (backend, found), wrap():
            torch.compile(Model(), fullgraph=True, backend=backend)(randn(1, 4, 5, 6))
        nodes = uses(found[direction], "hvd_syncbn.forward_moments")
        assert [bool(node.args[2] & 1) for node in nodes] == want
