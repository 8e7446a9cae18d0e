"""The PyTorch layer in one process, against torch.nn and against formulas.

Each tolerance is about what PyTorch's own rounding costs: its CPU kernels sum in float32 (in float64 for float64), so a float32
result is good to about 1e-6 of the data's scale (1 here; ten times that with the cancellation in dx), a float64 one to 1e-14,
and 16-bit results differ by a rounding, their last bit.
"""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_syncbn.torch import SyncBatchNorm, sync_batch_norm
from hvd_syncbn.torch_impl import ops
from tests.torch_tools import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    TOLERANCE,
    WEIGHTS,
    assert_close,
    assert_same,
    in_layout,
    pair,
    randn,
    randomize,
    step,
    theirs,
    threads,
)


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()
    assert hvd.size() == 1


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
    y, stats = ops.forward_apply(x, packet, weight, bias, residual, None, None, None, 0.9, 0.1, True, True, 1e-5, True, "layer")
    gradients, _, _ = ops.backward_moments(x, dy, y, stats, torch.float32)
    dx, dresidual = ops.backward_apply(x, dy, y, gradients, stats, weight, True, "layer")
    for start in range(0, sizes[0], step):
        part = slice(start, start + step)
        y_part, _ = ops.forward_apply(
            x[part], packet, weight, bias, residual[part], None, None, None, 0.9, 0.1, True, True, 1e-5, True, "layer"
        )
        assert y_part.nbytes < 16 << 20
        assert_same(y[part], y_part)
        parts = ops.backward_apply(x[part], dy[part], y[part], gradients, stats, weight, True, "layer")
        assert_same(dx[part], parts[0])
        assert_same(dresidual[part], parts[1])
