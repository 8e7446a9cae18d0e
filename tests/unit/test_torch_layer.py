"""The PyTorch layer in one process: against torch.nn, against the pure-Python reference, and what it does with bad input.

Bytes are compared wherever both sides are ours. Against `torch.nn` each tolerance is about what PyTorch's own rounding costs:
its CPU kernels sum in float32 (in float64 for float64), so a float32 result is good to about 1e-6 of the data's scale (1 here;
ten times that with the cancellation in dx), a float64 one to 1e-14, and 16-bit results differ by a rounding, their last bit.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from hvd_syncbn import native, protocol, vectors
from hvd_syncbn.cli.stacks import torch_stack
from hvd_syncbn.torch import SyncBatchNorm, check_device_errors, sync_batch_norm
from hvd_syncbn.torch_impl import ops
from tests.arrays import hostile
from tests.torch_tools import (
    DTYPES,
    LAYOUTS,
    assert_same,
    in_layout,
    isa,
    randn,
    randomize,
    reference_step,
    step,
    threads,
    to_torch,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2**-7, torch.float16: 2**-10}
WEIGHTS = 1e-7  # running statistics of any type: the protocol rounds 1 - momentum and momentum to float32
SHAPES = [(7, 5), (6, 5, 9), (4, 5, 6, 7), (3, 5, 4, 3, 6)]


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()
    assert hvd.size() == 1


def theirs(shape: tuple[int, ...], **options: Any) -> nn.Module:
    classes = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    return classes[len(shape)](shape[1], **options)


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> tuple[SyncBatchNorm, nn.Module]:
    """Our layer and theirs with the same state. 16-bit inputs have float32 parameters, as under autocast."""
    options["dtype"] = torch.float64 if dtype == torch.float64 else torch.float32
    ours, reference = SyncBatchNorm(shape[1], **options), randomize(theirs(shape, **options))
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


def assert_close(ours: Any, reference: Any, tolerance: float = TOLERANCE[torch.float32]) -> None:
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def large(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """`(x, dy, residual)` of 800 KiB in float32: a dozen tasks, whose grain is 64 KiB. With tails in every dimension."""
    return tuple(randn(seed, 3, 67, 31, 33, dtype=dtype) for seed in range(3))


# --- Against torch.nn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_equals_torch(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    ours, reference = pair(shape, dtype)
    x, dy = (in_layout(randn(seed, *shape, dtype=dtype), layout) for seed in (1, 2))
    got, want = step(ours, x, dy), step(reference, x, dy)
    assert got.keys() == want.keys() and len(got) == 7
    for name in got:
        # float32 beside a 16-bit input: PyTorch rounds parameter gradients to 16 bits in some kernels, statistics never.
        kept = dtype if name in ("dweight", "dbias") else got[name].dtype
        tolerance = TOLERANCE.get(kept, 0)
        assert_close(got[name], want[name], max(tolerance, WEIGHTS) if name.startswith("running") else tolerance)


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"momentum": 0.0}, {"momentum": 1.0}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.5}],
    ids=str,
)
def test_options_equal_torch(options: dict[str, Any]) -> None:
    shape = (4, 5, 6, 7)
    ours, reference = pair(shape, **options)
    for seed in range(3):
        x, dy = 2 * randn(seed, *shape) + 3, randn(seed + 9, *shape)
        assert_close(step(ours, x, dy), step(reference, x, dy))
    assert dict(ours.named_buffers()).keys() == dict(reference.named_buffers()).keys()
    x = randn(5, *shape)
    assert_close(ours.eval()(x), reference.eval()(x))


def test_no_bias() -> None:
    if "bias" not in nn.BatchNorm2d.__init__.__annotations__:
        pytest.skip("this PyTorch has no batch norm without bias")
    reference = randomize(nn.BatchNorm2d(5, bias=False))
    ours = SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(5, bias=False)))[0]
    ours.load_state_dict(reference.state_dict())
    x, dy = randn(1, 4, 5, 6, 7), randn(2, 4, 5, 6, 7)
    assert_close(step(ours, x, dy), step(reference, x, dy))


def test_running_statistics_switched_off() -> None:
    """A layer whose `track_running_stats` is taken away later keeps its buffers as they are."""
    layer = randomize(SyncBatchNorm(3))
    layer.track_running_stats = False
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer(torch.full((2, 3, 4), torch.nan))
    assert_same(dict(layer.named_buffers()), before)


def test_average_of_batches() -> None:
    """momentum=None: the plain average over batches, here of equal sizes."""
    layer = SyncBatchNorm(5, momentum=None, dtype=torch.float64)
    x = randn(1, 4, 6, 5, 7, dtype=torch.float64)
    for batch in x:
        layer(batch)
    assert_close(layer.running_mean, x.mean((0, 1, 3)), WEIGHTS)
    assert_close(layer.running_var, x.var((1, 3)).mean(0), WEIGHTS)


@pytest.mark.parametrize("training", [True, False])
def test_function_equals_layer(training: bool) -> None:
    """By the positions of `F.batch_norm`, defaults included."""
    x, residual = randn(1, 4, 5, 6), randn(2, 4, 5, 6)
    for momentum, eps, rest in (
        (0.3, 0.01, {"residual": residual, "activation": "relu", "process_set": hvd.global_process_set, "name": "name"}),
        (0.1, 1e-5, {}),
    ):
        layer = randomize(SyncBatchNorm(5, momentum=momentum, eps=eps, activation=rest.get("activation"))).train(training)
        weight, bias, mean, var, _ = (tensor.detach().clone() for tensor in (*layer.parameters(), *layer.buffers()))
        options = (training, momentum, eps) if rest else (training,)
        y = sync_batch_norm(x, mean, var, weight, bias, *options, **rest)
        assert_same([y, mean, var], [layer(x, rest.get("residual")), layer.running_mean, layer.running_var])


@pytest.mark.parametrize("activation", [None, "relu"])
def test_evaluation_is_torchs(activation: str | None) -> None:
    """Its bytes too, since it is PyTorch's own kernel; and it counts nothing."""
    shape = (4, 5, 6, 7)
    ours, reference = pair(shape)
    ours.activation = activation
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    x, residual = randn(1, *shape), randn(2, *shape)
    y = reference.eval()(x) + residual
    assert_same(ours.eval()(x, residual), F.relu(y) if activation else y)
    assert_same(dict(ours.named_buffers()), before)


def test_frozen() -> None:
    """Evaluation mode in training: gradients flow, statistics stay."""
    shape = (4, 5, 6, 7)
    ours, reference = pair(shape)
    x, dy = randn(1, *shape), randn(2, *shape)
    assert_same(step(ours.eval(), x, dy), step(reference.eval(), x, dy))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Roundings of 6e-8 and 1e-16 per step: 20 steps were seen to make 6e-7 and 1e-15 of them.
    [(torch.float32, 2e-5), (torch.float64, 1e-13)],
    ids=str,
)
def test_training_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    def train(convert: bool) -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Flatten(), nn.Linear(8 * 4 * 4, 6), nn.BatchNorm1d(6),
        ).to(dtype)  # fmt: skip
        if convert:
            model = SyncBatchNorm.convert_sync_batchnorm(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for i in range(20):
            loss = F.cross_entropy(model(randn(i, 10, 3, 8, 8, dtype=dtype)), torch.arange(10) % 6)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, model

    with threads(1):  # two are slower on tensors this small
        (losses, ours), (their_losses, reference) = train(True), train(False)
    assert any(isinstance(layer, SyncBatchNorm) for layer in ours)
    assert max(losses) - min(losses) > 0.1  # it did train
    np.testing.assert_allclose(losses, their_losses, rtol=tolerance)
    for name, value in reference.state_dict().items():
        assert_close(ours.state_dict()[name], value, max(tolerance, 10 * WEIGHTS) if "running" in name else tolerance)


# --- Against formulas -------------------------------------------------------------------------------------------------


def composed(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, eps: float = 1e-5) -> Tensor:
    """Batch norm out of PyTorch's elementary operations."""
    dims = [d for d in range(x.dim()) if d != 1]
    column = [1, -1, *[1] * (x.dim() - 2)]
    d = x - x.mean(dims, keepdim=True)
    y = d / (d.square().mean(dims, keepdim=True) + eps).sqrt() * weight.view(column) + bias.view(column)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_gradients_equal_autograd(residual: bool, relu: bool) -> None:
    shape = (4, 5, 3, 7)
    inputs = [randn(1, *shape), randn(2, 5), randn(3, 5), randn(4, *shape)][: 3 + residual]
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    x, weight, bias, *rest = inputs
    added = rest[0] if rest else None
    dy = randn(5, *shape, dtype=torch.float64)
    ours = sync_batch_norm(x, None, None, weight, bias, residual=added, activation="relu" if relu else None)
    reference = composed(x, weight, bias, added, relu)
    # Both in float64: sums of 84 terms of about 1.
    torch.testing.assert_close(ours, reference, rtol=1e-13, atol=1e-13)
    gradients = torch.autograd.grad(ours, inputs, dy)
    torch.testing.assert_close(gradients, torch.autograd.grad(reference, inputs, dy), rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    inputs = [randn(seed, *shape, dtype=torch.float64) for seed, shape in enumerate([(3, 2, 4), (2,), (2,), (3, 2, 4)])]

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return sync_batch_norm(x, None, None, weight, bias, residual=residual)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4])
def test_accuracy(ratio: float) -> None:
    """1 ulp of max(|y|, 1), 1.2 at a mean of 1e4 standard deviations (docs/protocol.md, section 5)."""
    x = randn(1, 16, 3, 20, 20) + ratio
    y = sync_batch_norm(x, None, None)
    one = torch.ones(3, dtype=torch.float64)
    exact = composed(x.double(), one, 0 * one, None, False)  # float64's own error there is 1e-8, a tenth of an ulp
    ulp = 2.0 ** exact.abs().clamp(min=1).log2().floor() * 2**-23
    assert ((y - exact).abs() / ulp).max() <= (1.0 if ratio <= 1e2 else 1.2)


# --- Against the reference, in bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("nonfinite", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_equals_reference(dtype: str, nonfinite: bool, relu: bool, layout: str) -> None:
    shape = 3, 5, 7, 2
    rng = np.random.default_rng(protocol.DTYPES.index(dtype))
    values = [hostile(rng, shape, dtype, nonfinite and i == 0) for i in range(3)]
    layer = randomize(SyncBatchNorm(5, activation="relu" if relu else None))
    (want,) = reference_step([values], layer, dtype)
    assert_same(step(layer, *(in_layout(to_torch(v, dtype), layout) for v in values)), want)


def test_one_core_for_python_and_the_operators() -> None:
    """Else `native.set_isa` would not reach the operators, and the tests below would compare a path with itself."""
    native.isa()
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libhvd_syncbn.so" in line}
    assert len(files) == 1


def results(shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Any]:
    """A step with everything in it, and one with nothing."""
    tensors = large(dtype) if shape is None else tuple(randn(seed, *shape, dtype=dtype) for seed in range(3))
    x, dy, residual = (in_layout(tensor, layout) for tensor in tensors)
    full = randomize(SyncBatchNorm(x.shape[1], activation="relu"))
    return [step(full, x, dy, residual), step(SyncBatchNorm(x.shape[1], affine=False, track_running_stats=False), x, dy)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_paths_threads_and_layouts_give_the_same_bytes(dtype: torch.dtype) -> None:
    with threads(1), isa("baseline"):
        want = results(dtype=dtype)
    for path in native.isas():
        for number in (1, 2):
            for layout in LAYOUTS:
                with threads(number), isa(path):
                    assert_same(results(dtype=dtype, layout=layout), want, f"{path}, {number} threads, {layout}:")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts_give_the_same_bytes(shape: tuple[int, ...]) -> None:
    assert_same(results(shape, layout="channels_last"), results(shape))


def test_stack_has_one_digest() -> None:
    """What tests/parallel continues over ranks and splits."""
    digests = set()
    for path in native.isas():
        for layout in LAYOUTS:
            with isa(path):
                y, dx, running = torch_stack(list(range(vectors.SAMPLES)), layout)
            digests.add(vectors.digest(y, dx, running))
    assert len(digests) == 1


def test_flush_to_zero_changes_nothing() -> None:
    """Denormals in, denormals through, denormals out, whatever the caller's threads do with theirs."""
    shape = (16, 32, 20, 20)  # two threads' worth
    x, dy, residual = (randn(seed, *shape) * 1e-42 for seed in range(3))
    # The output is x * 316, and x, dy and dx alike are below the least normal number, 1.2e-38.
    for number in (1, 2):
        with threads(number):
            for layout in LAYOUTS:
                inputs = [in_layout(tensor, layout) for tensor in (x, dy, residual)]
                want = step(SyncBatchNorm(32, activation="relu"), *inputs)
                assert 0 < want["y"].max() < 1e-38 and 0 < want["dx"].abs().max() < 1e-38
                assert 0 < want["running_mean"].abs().max() < 1e-38
                try:
                    if not torch.set_flush_denormal(True):
                        pytest.skip("this machine cannot flush denormals")
                    assert (x[0, 0, 0] * 1.0).count_nonzero() == 0  # in this thread; PyTorch leaves its workers alone
                    got = step(SyncBatchNorm(32, activation="relu"), *inputs)
                finally:
                    torch.set_flush_denormal(False)
                assert_same(got, want)


# --- Inputs as they lie in memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (6, 5, 1, 1), (6, 1, 4, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_lies_as_the_input(shape: tuple[int, ...], layout: str) -> None:
    x, residual = in_layout(randn(1, *shape), layout), randn(2, *shape)
    x.requires_grad_()
    y = SyncBatchNorm(shape[1], activation="relu")(x, residual)
    y.backward(randn(3, *shape))
    assert x.grad is not None
    assert y.stride() == x.stride() == x.grad.stride()


def test_channels_last_as_torch_spells_it() -> None:
    for x, memory_format in (
        (randn(1, 4, 5, 6, 7), torch.channels_last),
        (randn(1, 3, 5, 4, 3, 6), torch.channels_last_3d),
    ):
        y = SyncBatchNorm(5)(x.to(memory_format=memory_format))
        assert y.is_contiguous(memory_format=memory_format)
        assert_same(y, SyncBatchNorm(5)(x))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2],
        lambda x: x[:, 1::2],
        lambda x: x[..., 1:],
        lambda x: x[:, :, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x.transpose(0, 1),
        lambda x: x.flip(0).permute(0, 3, 1, 2),
        lambda x: x[:1].expand(6, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
        lambda x: in_layout(x, "channels_last")[:, ::2],
        lambda x: in_layout(x, "channels_last")[:, :, 1:, ::2],
        lambda x: torch.as_strided(x, (2, 3, 4, 4), (8, 4, 2, 1)),
    ],
)
def test_strided_inputs(view: Any) -> None:
    """Of x, dy and residual."""
    x, dy, residual = (view(randn(seed, 6, 5, 8, 9)) for seed in range(3))
    layer = randomize(SyncBatchNorm(x.shape[1], activation="relu"))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    got = step(layer, x, dy, residual)
    layer.load_state_dict(state)
    assert_same(got, step(layer, *(tensor.clone(memory_format=torch.contiguous_format) for tensor in (x, dy, residual))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_tensors_in_another_layout(layout: str) -> None:
    """A compiler may keep what backward reads as it likes."""
    x, dy, y = (randn(seed, 4, 5, 6, 7) for seed in range(3))
    stats = torch.ones(2, 5, dtype=torch.float64)

    def backward(x: Tensor, dy: Tensor, y: Tensor) -> list[Tensor]:
        packet, *parameters = ops.backward_moments(x, dy, y, stats, torch.float32)
        return [packet, *parameters, *ops.backward_apply(x, dy, y, packet, stats, None, True, "name")]

    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    assert_same(backward(in_layout(x, layout), in_layout(dy, other), in_layout(y, other)), backward(x, dy, y))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_stride_gradient(layout: str) -> None:
    x = in_layout(randn(1, 4, 5, 6, 7), layout)
    results = []
    for ones in (lambda y: y.sum().backward(), lambda y: y.backward(torch.ones(4, 5, 6, 7))):
        layer, leaf = randomize(SyncBatchNorm(5, activation="relu")), x.clone().requires_grad_()
        ones(layer(leaf))
        results.append([leaf.grad, *(p.grad for p in layer.parameters())])
    assert_same(*results)


# --- Fused residual and activation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_fused_equals_separate_steps(with_residual: bool, dtype: torch.dtype, layout: str) -> None:
    """In bytes where every step rounds to the tensor's type anyway; a fused residual, or 16-bit type, rounds less often."""

    class Separate(SyncBatchNorm):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            return F.relu(y if residual is None else y + residual)

    x, dy, residual = (in_layout(randn(seed, 4, 5, 6, 7, dtype=dtype), layout) for seed in range(3))
    added = residual if with_residual else None
    got, want = (step(randomize(layer), x, dy, added) for layer in (SyncBatchNorm(5, activation="relu"), Separate(5)))
    assert 0 < got["y"].count_nonzero() < got["y"].numel()
    if dtype in (torch.float32, torch.float64) and not with_residual:
        assert_same(got, want)
    else:
        # Not the gradients: an output that one of them rounds to 0 is masked there and not here.
        assert_close(got["y"], want["y"], TOLERANCE[dtype])


def test_residual_is_the_input() -> None:
    x, dy = randn(1, 4, 5, 6), randn(2, 4, 5, 6)
    leaf = x.clone().requires_grad_()
    randomize(SyncBatchNorm(5, activation="relu"))(leaf, leaf).backward(dy)
    apart = step(randomize(SyncBatchNorm(5, activation="relu")), x, dy, x)
    assert_same(leaf.grad, apart["dx"] + apart["dresidual"])


@pytest.mark.parametrize("wanted", range(4), ids=["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_one_gradient_alone(wanted: int, activation: str | None) -> None:
    """Equal to the one among all four."""
    values, dy = [randn(1, 4, 5, 6), randn(2, 5), randn(3, 5), randn(4, 4, 5, 6)], randn(5, 4, 5, 6)

    def gradients(*which: int) -> list[Tensor | None]:
        tensors = [value.clone().requires_grad_(i in which) for i, value in enumerate(values)]
        x, weight, bias, residual = tensors
        sync_batch_norm(x, None, None, weight, bias, residual=residual, activation=activation).backward(dy)
        return [tensor.grad for tensor in tensors]

    alone = gradients(wanted)
    assert [g is not None for g in alone] == [i == wanted for i in range(4)]
    assert_same(alone[wanted], gradients(0, 1, 2, 3)[wanted])


# --- Mixed precision --------------------------------------------------------------------------------------------------


def test_autocast() -> None:
    conv, layer = nn.Conv2d(3, 5, 3), randomize(SyncBatchNorm(5, activation="relu"))
    x, residual = randn(1, 4, 3, 8, 8), randn(2, 4, 5, 6, 6).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = conv(x)
        hidden.retain_grad()
        y = layer(hidden, residual)
    assert hidden.dtype == y.dtype == torch.bfloat16
    dy = randn(3, 4, 5, 6, 6, dtype=torch.bfloat16)
    y.backward(dy)
    want = step(randomize(SyncBatchNorm(5, activation="relu")), hidden.detach(), dy, residual.detach().bfloat16())
    assert residual.grad.dtype == layer.weight.grad.dtype == layer.running_mean.dtype == torch.float32
    got = {"y": y, "dx": hidden.grad, "dresidual": residual.grad.bfloat16(), "dweight": layer.weight.grad}
    assert_same(got, {name: want[name] for name in got})
    assert conv.weight.grad is not None and conv.weight.grad.isfinite().all()


def test_parameters_of_any_type() -> None:
    """A whole model in bfloat16: parameters, buffers and their gradients round from the same sums."""
    x, dy = randn(1, 4, 5, 6, dtype=torch.bfloat16), randn(2, 4, 5, 6, dtype=torch.bfloat16)
    narrow = SyncBatchNorm(5, dtype=torch.bfloat16)
    got, want = step(narrow, x, dy), step(SyncBatchNorm(5), x, dy)
    for name in ("y", "dx"):
        assert_same(got[name], want[name])
    for name in ("dweight", "dbias"):
        assert_same(got[name], want[name].bfloat16())
    # The weights of running statistics are float32 and the state before is 0 and 1, exact in both.
    assert_same(got["running_mean"], want["running_mean"].bfloat16())
    assert_same(got["running_var"], want["running_var"].bfloat16())


# --- Autograd ---------------------------------------------------------------------------------------------------------


def test_differentiating_twice() -> None:
    x = randn(1, 4, 5, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(SyncBatchNorm(5)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


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
    # Without an activation the output is nobody's but the caller's.
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


# --- Empty and bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 6, 7), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_empty_batch(shape: tuple[int, ...], activation: str | None) -> None:
    layer = randomize(SyncBatchNorm(5, activation=activation))
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    got = step(layer, torch.empty(shape), torch.empty(shape), torch.empty(shape))
    for name in ("y", "dx", "dresidual"):
        assert got[name].shape == shape
    assert_same([got[name] for name in ("dweight", "dbias")], [torch.zeros(5), torch.zeros(5)])
    assert_same([got["running_mean"], got["running_var"]], [mean, var])


X = torch.zeros(4, 3, 2)
BAD: list[tuple[Any, type[Exception], list[str]]] = [
    (lambda f: f(torch.zeros(3)), ValueError, ["2 dimensions", "(3,)"]),
    (lambda f: f(torch.tensor(1.0)), ValueError, ["2 dimensions", "()"]),
    (lambda f: f(torch.zeros(2, 4, 5)), ValueError, ["3", "Received", "4", "(2, 4, 5)"]),
    (lambda f: f(X.long()), TypeError, ["float32", "torch.int64"]),
    (lambda f: f(X.bool()), TypeError, ["float32", "torch.bool"]),
    (lambda f: f(X.to(torch.complex64)), TypeError, ["float32", "torch.complex64"]),
    (lambda f: f(X.to(torch.float8_e4m3fn)), TypeError, ["float32", "torch.float8_e4m3fn"]),
    (lambda f: f(X, residual=torch.zeros(4, 3)), ValueError, ["residual", "(4, 3, 2)", "(4, 3)"]),
    (lambda f: f(X, residual=torch.zeros(4, 3, 1)), ValueError, ["residual", "(4, 3, 2)", "(4, 3, 1)"]),
    (lambda f: f(X, residual=X.double()), TypeError, ["residual", "torch.float32", "torch.float64"]),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize(("call", "error", "fragments"), BAD)
def test_bad_input(
    call: Any, error: type[Exception], fragments: list[str], functional: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error that names what came, before anything is sent or changed."""
    layer = randomize(SyncBatchNorm(3)).train(training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}

    def function(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return sync_batch_norm(x, layer.running_mean, layer.running_var, training=training, residual=residual)

    monkeypatch.setattr(ops, "sync_batch_norm", lambda *_: pytest.fail("an operator was called"))
    with pytest.raises(error) as caught:
        call(function if functional else layer)
    assert type(caught.value) is error
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert_same(dict(layer.state_dict()), before)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_vector_of_another_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "sync_batch_norm", lambda *_: pytest.fail("an operator was called"))
    vectors = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), name: torch.zeros(7)}
    with pytest.raises(ValueError, match=rf"{name} .* 3 channels .*Received: shape \(7,\)"):
        sync_batch_norm(X, **vectors)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="'gelu'"):
        SyncBatchNorm(3, activation="gelu")
    with pytest.raises(ValueError, match="'gelu'"):
        sync_batch_norm(X, None, None, activation="gelu")


def test_process_set_unknown_to_horovod() -> None:
    layer = SyncBatchNorm(3, process_set=hvd.ProcessSet([0]))
    with pytest.raises(ValueError, match=r"not registered.*add_process_set.*Received: ProcessSet"):
        layer(X)
    assert layer.num_batches_tracked == 0
    layer.eval()(X)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)], ids=str)
def test_one_value_per_channel(shape: tuple[int, ...]) -> None:
    layer = randomize(SyncBatchNorm(3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=rf"Expected more than 1 value per channel when training.*{layer.collective_name}"):
        layer(torch.zeros(shape))
    assert_same(dict(layer.state_dict()), before)
    layer.eval()(torch.zeros(shape))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_nonfinite(dtype: torch.dtype, value: float) -> None:
    """One bad value is NaN in its channel, in everything but the running statistics, and nowhere else."""
    x, dy = (randn(seed, 4, 5, 6, 7, dtype=dtype) for seed in (1, 2))
    good = step(SyncBatchNorm(5), x, dy)
    x[2, 3, 1, 4] = value
    got = step(SyncBatchNorm(5), x, dy)
    rest = [0, 1, 2, 4]
    for name in ("y", "dx"):
        assert got[name][:, 3].isnan().all()
        assert_same(got[name][:, rest], good[name][:, rest])
    assert got["dweight"][3].isnan()
    assert got["running_mean"][3] == 0 and got["running_var"][3] == 1
    for name in ("dweight", "running_mean", "running_var"):
        assert_same(got[name][rest], good[name][rest])


def test_nonfinite_gradient() -> None:
    x, dy = randn(1, 4, 5, 6), randn(2, 4, 5, 6)
    good = step(SyncBatchNorm(5), x, dy)
    dy[1, 2, 3] = torch.inf
    got = step(SyncBatchNorm(5), x, dy)
    assert_same(got["y"], good["y"])
    assert got["dx"][:, 2].isnan().all() and not got["dbias"][2].isfinite() and not got["dweight"][2].isfinite()
    rest = [0, 1, 3, 4]
    assert_same(got["dx"][:, rest], good["dx"][:, rest])
    for name in ("dweight", "dbias"):
        assert_same(got[name][rest], good[name][rest])


# --- Without Horovod --------------------------------------------------------------------------------------------------


PROGRAM = """
import sys, torch
from hvd_syncbn.torch import SyncBatchNorm
layer, x = SyncBatchNorm(3), torch.ones(2, 3, 4)
"""


def run_python(code: str) -> str:
    """Runs a program of its own: this process has Horovod initialised for good."""
    command = [sys.executable, "-c", PROGRAM + code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return result.stdout


FAILS = """
try:
    layer(x)
except RuntimeError as error:
    print(type(error).__name__, error)
"""


def test_evaluation_needs_no_horovod() -> None:
    output = run_python(
        """
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "horovod":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
assert not any(name.split(".")[0] == "horovod" for name in sys.modules)
print(layer.eval()(x).sum().item())
layer.train()
"""
        + FAILS
    )
    evaluated, error = output.splitlines()
    assert float(evaluated) == pytest.approx(24, rel=1e-4)  # 24 / sqrt(1 + eps)
    assert error.startswith("RuntimeError") and "PyTorch" in error and "`hvd-syncbn build-horovod`" in error


def test_horovod_not_initialised_or_not_loading() -> None:
    output = run_python(
        FAILS
        + """
print(layer.num_batches_tracked.item(), layer.eval()(x).sum().item())
layer.train()
from hvd_syncbn import horovod
horovod.load.cache_clear()
for name in [name for name in sys.modules if name.split(".")[0] == "horovod"]:
    del sys.modules[name]
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "horovod.torch":
            raise ImportError("mpi_lib_v2.so: undefined symbol\\nand more")
sys.meta_path.insert(0, Broken())
"""
        + FAILS
    )
    uninitialised, evaluated, broken = output.splitlines()
    assert uninitialised.startswith("RuntimeError") and "horovod.torch.init()" in uninitialised
    assert evaluated.split()[0] == "0" and float(evaluated.split()[1]) == pytest.approx(24, rel=1e-4)
    assert "does not load for PyTorch" in broken and "`hvd-syncbn build-horovod`" in broken and "undefined symbol" in broken


# --- The module as an object ------------------------------------------------------------------------------------------


def test_repr() -> None:
    assert repr(SyncBatchNorm(3)) == repr(nn.BatchNorm2d(3)).replace("BatchNorm2d", "SyncBatchNorm")
    text = repr(SyncBatchNorm(3, eps=0.5, momentum=None, affine=False, process_set=hvd.global_process_set, activation="relu"))
    for part in ("3, eps=0.5, momentum=None, affine=False", "activation=relu", "process_set=ProcessSet("):
        assert part in text


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_state_dict_exchange(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    reference, ours = randomize(theirs(shape, **options)), SyncBatchNorm(shape[1], **options)
    assert list(ours.state_dict()) == list(reference.state_dict())
    ours.load_state_dict(reference.state_dict(), strict=True)
    assert_same(dict(ours.state_dict()), dict(reference.state_dict()))
    randomize(ours, 1)
    reference.load_state_dict(ours.state_dict(), strict=True)
    assert_same(dict(reference.state_dict()), dict(ours.state_dict()))
    # Files from before the batch counter.
    old = {name: value for name, value in ours.state_dict().items() if name != "num_batches_tracked"}
    ours.load_state_dict(old, strict=True)


def test_device_and_dtype() -> None:
    layer = SyncBatchNorm(3, device="meta", dtype=torch.float64)
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"meta"}
    assert layer.weight.dtype == layer.running_var.dtype == torch.float64
    y = layer(torch.empty(4, 3, 5, device="meta", dtype=torch.float64))
    assert y.shape == (4, 3, 5) and y.dtype == torch.float64


@pytest.mark.parametrize(
    ("sizes", "dtype", "channels_last"),
    [
        ((5, 64, 128, 112), torch.float32, False),
        ((5, 64, 128, 112), torch.float32, True),
        ((5, 64, 128, 224), torch.bfloat16, True),
        ((5, 64, 128, 224), torch.float16, False),
        ((5, 64, 64, 112), torch.float64, True),
        ((4100, 1024), torch.float32, False),
    ],
    ids=str,
)
def test_large_outputs(sizes: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> None:
    """Outputs of 16 MiB and more are written around the caches (csrc/cpu/apply.h): the same bytes as sample by sample."""
    torch.manual_seed(0)
    x, dy, residual = (torch.randn(sizes).to(dtype) for _ in range(3))
    if channels_last:
        x, dy, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, residual))
    assert x.nbytes >= 16 << 20
    weight, bias = torch.randn(2, sizes[1])
    step = -(-sizes[0] // 5)

    packet = ops.forward_moments(x, 1e-5)
    y, stats = ops.forward_apply(x, packet, weight, bias, residual, None, None, None, 0.9, 0.1, True, 1e-5, True, "layer")
    gradients, _, _ = ops.backward_moments(x, dy, y, stats, torch.float32)
    dx, dresidual = ops.backward_apply(x, dy, y, gradients, stats, weight, True, "layer")
    for start in range(0, sizes[0], step):
        part = slice(start, start + step)
        y_part, _ = ops.forward_apply(
            x[part], packet, weight, bias, residual[part], None, None, None, 0.9, 0.1, True, 1e-5, True, "layer"
        )
        assert y_part.nbytes < 16 << 20
        assert_same(y[part], y_part)
        parts = ops.backward_apply(x[part], dy[part], y[part], gradients, stats, weight, True, "layer")
        assert_same(dx[part], parts[0])
        assert_same(dresidual[part], parts[1])


def test_device_errors_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to tell where no GPU is used; a GPU that is asked for by name and is not there is an error of ours."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device_errors()
    with pytest.raises(RuntimeError, match=r"no GPU can be used here.*Received: device=cuda:1"):
        check_device_errors("cuda:1")


def test_an_old_pytorch_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"not synchronized there\. Received: 2\.4\.1"):
        ops.warn_if_older("2.4.1+cu124")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("2.13.0+cpu", "2.14.1", "3.0.0a0+git12"):
            ops.warn_if_older(version)
