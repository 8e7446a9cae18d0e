"""freeze_batchnorm in PyTorch: what a frozen layer computes, what freezing survives, and that unfreezing gives all back."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_syncbn import native, protocol
from hvd_syncbn.torch import (
    SyncBatchNorm,
    convert_sync_batchnorm,
    fold_batchnorm,
    freeze_batchnorm,
    revert_sync_batchnorm,
    unfreeze_batchnorm,
)
from hvd_syncbn.torch_impl.freeze import is_frozen
from tests.arrays import hostile
from tests.torch_tools import DTYPES, LAYOUTS, assert_same, in_layout, isa, randn, randomize, step, to_numpy, to_torch

SHAPES = [(7, 5), (6, 5, 9), (4, 5, 6, 7), (3, 5, 4, 3, 6)]


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


class Doubled(nn.BatchNorm2d):
    """A user-defined subclass that contains another layer."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Doubled(4), SyncBatchNorm(4)))


X, DY = randn(1, 6, 3, 7, 7), randn(2, 6, 4, 5, 5)

# --- What a frozen layer computes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_the_references(dtype: str, affine: bool, relu: bool, layout: str) -> None:
    """On every instruction-set path."""
    shape = 3, 5, 7, 2
    rng = np.random.default_rng(1)
    # Infinite gradients are NaN here: they are a loss scaler's to see, either way.
    x, dy, residual = (hostile(rng, shape, dtype, nonfinite=i == 0) for i in range(3))
    for path in native.isas():
        layer = randomize(SyncBatchNorm(5, activation="relu" if relu else None))
        freeze_batchnorm(layer.train(), affine)
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        with isa(path):
            got = step(layer, *(in_layout(to_torch(v, dtype), layout) for v in (x, dy, residual)))
        flat = [v.reshape(3, 5, -1) for v in (x, dy, residual)]
        gamma, beta, mean, var = (
            to_numpy(t).astype(np.float64) for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        )
        statistics = protocol.stored_statistics(mean, var, layer.eps)
        y = protocol.apply_forward(flat[0], statistics, dtype, gamma, beta, flat[2], relu)
        mask = y if relu else None
        none = protocol.empty_packet(5)
        dx, dresidual = protocol.apply_backward(np.zeros_like(flat[0]), flat[1], none, statistics, dtype, gamma, mask)
        want = {
            "y": to_torch(y.reshape(shape), dtype),
            "dx": to_torch(dx.reshape(shape), dtype),
            "dresidual": to_torch(dresidual.reshape(shape), dtype),
        }
        if affine:
            packet = protocol.backward_packet(flat[0], flat[1], statistics, mask)
            dweight, dbias = np.array(protocol.parameter_gradients(packet, statistics)).T
            want |= {"dweight": to_torch(dweight), "dbias": to_torch(dbias)}
        assert_same(got, want | before, path)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_close_to_torchs_evaluation(shape: tuple[int, ...], activation: str | None, affine: bool) -> None:
    """The same in PyTorch's kernels and by its autograd; float64, whose sums over 200 values round at 1e-14."""
    layer = randomize(SyncBatchNorm(5, activation=activation, dtype=torch.float64))
    x, dy, residual = (randn(seed, *shape, dtype=torch.float64) for seed in range(3))
    inputs = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    y = F.batch_norm(inputs[0], layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps)
    y = y + inputs[1]
    y = F.relu(y) if activation else y
    want = torch.autograd.grad(y, [*inputs, layer.weight, layer.bias], dy)
    got = step(freeze_batchnorm(layer, affine).train(), x, dy, residual)
    torch.testing.assert_close([got["y"], got["dx"], got["dresidual"]], [y, *want[:2]], rtol=1e-13, atol=1e-13)
    assert ("dweight" in got) == ("dbias" in got) == affine
    if affine:
        torch.testing.assert_close([got["dweight"], got["dbias"]], list(want[2:]), rtol=1e-12, atol=1e-12)


def test_channels_know_nothing_of_each_other() -> None:
    """131 of them, which is more than the core's blocks and vectors hold: the bytes of each alone."""
    layer = freeze_batchnorm(randomize(SyncBatchNorm(131, activation="relu")).train(), affine=True)
    x, dy, residual = (randn(seed, 2, 131, 3) for seed in range(3))
    whole = step(layer, x, dy, residual)
    for c in (0, 63, 64, 65, 130):
        one = SyncBatchNorm(1, activation="relu")
        one.load_state_dict({n: v[c : c + 1] if v.ndim else v for n, v in layer.state_dict().items()})
        freeze_batchnorm(one, affine=True)
        got = step(one, *(t[:, c : c + 1] for t in (x, dy, residual)))
        for name in ("y", "dx", "dresidual"):
            assert_same(got[name], whole[name][:, c : c + 1], f"{name} of channel {c}")
        assert_same([got["dweight"], got["dbias"]], [whole["dweight"][c : c + 1], whole["dbias"][c : c + 1]])


def test_gradients_equal_finite_differences() -> None:
    layer = randomize(SyncBatchNorm(2, dtype=torch.float64))
    freeze_batchnorm(layer, affine=True)

    def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, residual))

    shapes = [(3, 2, 4), (3, 2, 4), (2,), (2,)]
    inputs = [randn(seed, *shape, dtype=torch.float64).requires_grad_() for seed, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("options", [{"affine": False}, {}], ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 3), (1, 5), (2, 5, 0)], ids=str)
def test_small_batches(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """One value per channel, or none, is no error: no statistics are taken."""
    layer = freeze_batchnorm(randomize(SyncBatchNorm(5, **options)).train(), affine=True)
    got = step(layer, torch.ones(shape), torch.ones(shape))
    assert got["y"].shape == shape and got["dx"].shape == shape
    assert not options or "dweight" not in got


def test_what_is_kept_for_backward() -> None:
    """x is not, unless gamma or beta learn: that is most of a frozen network's memory."""

    def kept(affine: bool, activation: str | None) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        layer = freeze_batchnorm(randomize(SyncBatchNorm(4, activation=activation)).train(), affine)
        x = DY.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            layer(x)
        return [shape for shape in shapes if len(shape) == 4]

    assert kept(False, None) == []
    assert len(kept(False, "relu")) == 1
    assert len(kept(True, None)) == 1


def test_evaluation_stays_torchs() -> None:
    """In evaluation nothing changes, so exports do not."""
    layer, x = randomize(SyncBatchNorm(4, activation="relu")), DY
    want = layer.eval()(x, residual=x)
    assert_same(freeze_batchnorm(layer).eval()(x, residual=x), want)
    program = torch.export.export(layer.eval(), (x,))
    assert "hvd_syncbn" not in str(program.graph)


def test_autocast_and_compile() -> None:
    layer = freeze_batchnorm(randomize(SyncBatchNorm(4, activation="relu")).train(), affine=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(DY.bfloat16()).dtype == torch.bfloat16
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        x = DY.clone().requires_grad_()
        layer.zero_grad()
        y = function(x, DY)
        y.backward(DY)
        results.append([y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    assert_same(results[1], results[0])


def test_bad_input() -> None:
    layer = freeze_batchnorm(SyncBatchNorm(4))
    for x, error, message in (
        (torch.ones(4), ValueError, "at least 2 dimensions"),
        (torch.ones(2, 3), ValueError, "of 4 channels"),
        (torch.ones(2, 4, dtype=torch.int64), TypeError, "Received: torch.int64"),
    ):
        with pytest.raises(error, match=message):
            layer(x)
    with pytest.raises(ValueError, match="residual of the input's shape"):
        layer(torch.ones(2, 4), torch.ones(4))


# --- What freezing survives -------------------------------------------------------------------------------------------


def assert_frozen(frozen: nn.Module, affine: bool = False) -> None:
    """Statistics are used and do not change, and frozen parameters get no gradient."""
    frozen.train()
    layers = [layer for layer in frozen.modules() if is_batch_norm(layer)]
    assert len(layers) == 3 and all(is_frozen(layer) and not layer.training for layer in layers)
    assert frozen.training and frozen[0].training
    before = {name: buffer.clone() for name, buffer in frozen.named_buffers()}
    frozen.zero_grad()
    y = frozen(X)
    y.sum().backward()
    assert_same(dict(frozen.named_buffers()), before)
    for layer in layers:
        assert (layer.weight.grad is not None) == (layer.bias.grad is not None) == affine
    reference = copy.deepcopy(frozen).eval()
    for part in reference.modules():
        vars(part).pop("train", None)
    # The layers of this project round otherwise than PyTorch's in evaluation: a few roundings of values of about 10.
    torch.testing.assert_close(y, reference.eval()(X), rtol=1e-5, atol=1e-4)


def saved_and_loaded(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def again(frozen: nn.Module, affine: bool) -> nn.Module:
    return freeze_batchnorm(freeze_batchnorm(frozen, not affine), affine)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m,
        lambda m: m.eval().train(),
        convert_sync_batchnorm,
        lambda m: revert_sync_batchnorm(convert_sync_batchnorm(m)),
        copy.deepcopy,
        lambda m: copy.deepcopy(convert_sync_batchnorm(m)),
        saved_and_loaded,
        lambda m: pickle.loads(pickle.dumps(convert_sync_batchnorm(m))),
        lambda m: m.double().float(),
        lambda m: again(m, vars(m[1])["train"].affine),
    ],
    ids=[
        *("nothing", "modes", "convert", "convert-revert", "deepcopy", "convert-deepcopy"),
        *("torch.save", "convert-pickle", "to", "twice"),
    ],
)  # fmt: skip
def test_survives(change: Callable[[Any], Any], affine: bool) -> None:
    frozen = freeze_batchnorm(model(), affine)
    changed = change(frozen)
    assert_frozen(changed, affine)
    # A copy's layers are their own.
    for layer in changed.modules():
        if is_batch_norm(layer):
            assert vars(layer)["train"].layer is layer
    unfreeze_batchnorm(changed)
    assert all(layer.training for layer in changed.modules())
    assert all(parameter.requires_grad for parameter in changed.parameters())


def test_requires_grad_of_the_model() -> None:
    """It does not unfreeze a synchronized layer."""
    frozen = freeze_batchnorm(convert_sync_batchnorm(model())).train()
    frozen.requires_grad_(True)
    frozen(X).sum().backward()
    assert frozen[0].weight.grad is not None
    assert all(layer.weight.grad is None and layer.bias.grad is None for layer in frozen if is_batch_norm(layer))


def test_an_optimizer_leaves_frozen_layers_alone() -> None:
    """With weight decay and momentum, and gradients from before."""
    changing = model()
    optimizer = torch.optim.SGD(changing.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    changing(X).sum().backward()
    freeze_batchnorm(changing)
    before = copy.deepcopy(changing.state_dict())
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        changing(X).sum().backward()
        optimizer.step()
    changed = {name.partition(".")[0] for name, value in changing.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0"}


def test_state_dict_is_that_of_torch() -> None:
    frozen, other = freeze_batchnorm(model()), model()
    other.load_state_dict(frozen.state_dict(), strict=True)
    assert list(frozen.state_dict()) == list(other.state_dict())
    frozen.load_state_dict(other.state_dict(), strict=True)
    assert_frozen(frozen)


def test_unfreezing_gives_back_what_was_there() -> None:
    changing = model()
    changing[1].weight.requires_grad_(False)
    changing[3].eval()
    names = {name: list(vars(layer)) for name, layer in changing.named_modules()}
    want = copy.deepcopy(changing)
    unfreeze_batchnorm(freeze_batchnorm(changing))
    assert {name: list(vars(layer)) for name, layer in changing.named_modules()} == names
    assert not changing[1].weight.requires_grad and changing[1].bias.requires_grad
    assert [layer.training for layer in changing] == [True, True, True, False, True]
    assert_same(step(changing, X, DY), step(want, X, DY))
    unfreeze_batchnorm(changing)  # layers that are not frozen do not change
    assert_same(dict(changing.state_dict()), dict(want.state_dict()))


def test_shared_parameters() -> None:
    two = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    two[1].weight = two[0].weight
    unfreeze_batchnorm(freeze_batchnorm(two))
    assert all(parameter.requires_grad for parameter in two.parameters())


def test_layers_inside_a_norm_keep_their_mode() -> None:
    frozen = freeze_batchnorm(model())
    frozen.eval()
    assert not frozen[3].dropout.training
    frozen.train()
    assert frozen[3].dropout.training and not frozen[3].training


def test_frozen_layers_fold_while_the_rest_learns() -> None:
    network = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), SyncBatchNorm(4)))
    network[0].requires_grad_(False)
    freeze_batchnorm(network).train()
    with pytest.warns(UserWarning, match="'4' is not folded: '3' is being trained"):
        folded = fold_batchnorm(network)
    assert folded.training and isinstance(folded[1], nn.Identity) and not folded[0].weight.requires_grad
    y = folded(X)
    torch.testing.assert_close(y, network(X), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert folded[0].weight.grad is None and folded[0].bias.grad is None and folded[3].weight.grad is not None
    # The same with gamma and beta that learn: nothing to fold.
    freeze_batchnorm(network, affine=True)
    with pytest.warns(UserWarning, match="'1' is not folded: it is being trained"):
        fold_batchnorm(network)


# --- Wrong calls ------------------------------------------------------------------------------------------------------


class ByItself(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((0, 2, 3), keepdim=True)


def test_wrong_calls() -> None:
    for call in (freeze_batchnorm, unfreeze_batchnorm):
        with pytest.raises(TypeError, match=r"expected a torch.nn.Module. Received: dict"):
            call({})
        with pytest.warns(UserWarning, match=r"found no batch norm. Received: Linear"):
            call(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Received: 'yes'"):
        freeze_batchnorm(model(), "yes")  # type: ignore[arg-type]
    for last, message in (
        (nn.BatchNorm2d(4, track_running_stats=False), r"'5' keeps no running statistics.*Received: BatchNorm2d"),
        (nn.LazyBatchNorm2d(), r"lazy layer '5' has no channel count yet.*Received: LazyBatchNorm2d"),
    ):
        network = model().append(last)
        with pytest.raises(ValueError, match=message):
            freeze_batchnorm(network)
        assert not any(is_frozen(layer) for layer in network) and all(p.requires_grad for p in network[:5].parameters())
    with pytest.warns(UserWarning, match=r"layer '0' is kept in evaluation mode, but.*Received: ByItself"):
        assert is_frozen(freeze_batchnorm(nn.Sequential(ByItself(3)))[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze_batchnorm(model())
