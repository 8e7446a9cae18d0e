"""`recalibrate` in PyTorch on one rank: against the pure-Python reference and plain definitions, and what it leaves alone."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import horovod.torch as hvd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hvd_syncbn import progress
from hvd_syncbn.torch import SyncBatchNorm, freeze_batchnorm, recalibrate
from tests import recalibration
from tests.parallel.checks.torch_recalibrate import Stack
from tests.torch_tools import assert_same, in_layout, randn, randomize

pytestmark = pytest.mark.filterwarnings("ignore:the statistics of layer")


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()
    assert hvd.size() == 1


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def statistics(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.running_mean.clone(), layer.running_var.clone()


def direct(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of every channel, in float64."""
    rows = x.double().movedim(1, 0).flatten(1)
    return rows.mean(1).float(), rows.var(1).float()


def assert_close(got: Any, want: Any) -> None:
    """`direct` sums in another order, in float64; a float32 rounding may fall the other way."""
    torch.testing.assert_close(got, want, rtol=2e-7, atol=1e-7)


def batches() -> list[Tensor]:
    return list(torch.from_numpy(recalibration.images()).split(recalibration.GLOBAL_BATCHES))


def network(*norms: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(5, 4, 3), *norms, nn.Dropout(0.5), nn.ReLU(inplace=True))


# --- What it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("way", ["pooled", "batches", "layer by layer"])
def test_equals_reference(way: str, layout: str) -> None:
    """A stack with shortcuts and activations: every layer's statistics have the reference's bytes."""
    model = Stack()
    exact = way == "layer by layer"
    estimator = "pooled" if exact else way
    recalibrate(model, [in_layout(x, layout) for x in batches()], estimator=estimator, layer_by_layer=exact)
    want = recalibration.reference(estimator, recalibration.LAYERS if exact else 1)
    for layer, (mean, variance) in zip(model.layers, want, strict=True):
        assert_same(statistics(layer), (torch.from_numpy(mean), torch.from_numpy(variance)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [SyncBatchNorm, nn.BatchNorm2d], ids=["ours", "theirs"])
def test_types(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    layer = make(3, dtype=dtype)
    x = randn(1, 20, 3, 4, 5, dtype=dtype) * 3 + 1
    recalibrate(layer, x.split(7), estimator="pooled")
    want = [vector.to(dtype) for vector in (x.double().mean((0, 2, 3)), x.double().movedim(1, 0).flatten(1).var(1))]
    # A rounding to the dtype that may fall the other way; in float64 that of some hundred additions.
    tolerance = {"rtol": max(2 * torch.finfo(dtype).eps, 1e-14), "atol": 0.0}
    torch.testing.assert_close(statistics(layer), tuple(want), **tolerance)


def test_layer_by_layer_is_what_evaluation_sees() -> None:
    """Afterwards every norm's output has mean beta and variance gamma**2 over the data, however wrong it was before."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(m for _ in range(3) for m in (nn.Conv2d(4, 4, 3, padding=1), SyncBatchNorm(4, eps=1e-12), nn.ReLU()))
    )
    data = randn(1, 30, 4, 6, 6) * 50 + 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recalibrate(model, data.split(8), layer_by_layer=True)
    model.eval()
    x = data
    for layer in model:
        x = layer(x).detach()
        if isinstance(layer, SyncBatchNorm):
            torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
            torch.testing.assert_close(x.var((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)


def test_one_pass_says_when_it_is_not_enough() -> None:
    model = nn.Sequential(SyncBatchNorm(4), SyncBatchNorm(4))
    data = [randn(1, 30, 4) * 50]
    with pytest.warns(UserWarning, match=r"layer '0' moved by .* standard deviations.*layer_by_layer=True"):
        recalibrate(model, data, estimator="pooled")
    with pytest.warns(UserWarning, match="moved"):
        recalibrate(nn.Sequential(SyncBatchNorm(4), nn.Tanh(), SyncBatchNorm(4)), data, estimator="pooled")
    recalibrate(model, data, estimator="pooled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recalibrate(model, data, estimator="pooled")  # what it was measured with before
        recalibrate(SyncBatchNorm(4), data, estimator="pooled")  # with nothing behind it
        recalibrate(nn.Sequential(SyncBatchNorm(4), SyncBatchNorm(4)), data, estimator="batches")


def test_used_twice() -> None:
    """Every use counts: its values (pooled), or as a batch of its own (batches)."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = SyncBatchNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(2 * x + 1)

    a, b = randn(1, 10, 3, 4), randn(2, 6, 3, 4)
    pooled, paper = Twice(), Twice()
    recalibrate(pooled, [a, b], estimator="pooled")
    assert_close(statistics(pooled.norm), direct(torch.cat([a, b, 2 * a + 1, 2 * b + 1])))
    recalibrate(paper, [a, b], estimator="batches")
    means, variances = zip(*(direct(x) for x in (a, b, 2 * a + 1, 2 * b + 1)), strict=True)
    assert_close(statistics(paper.norm), (torch.stack(means).mean(0), torch.stack(variances).mean(0)))


def test_every_batch_norm_takes_part() -> None:
    """PyTorch's own; a subclass that does something to its input first; a function of it with the layer's buffers."""

    class Scaled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input * 4)

    class ByHand(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.batch_norm(input + 1, self.running_mean, self.running_var, self.weight, self.bias, self.training)

    x = randn(1, 12, 3, 4, 4)
    for layer, inputs in (
        (nn.BatchNorm2d(3), x),
        (nn.SyncBatchNorm(3), x),
        (SyncBatchNorm(3, activation="relu"), x),
        (Scaled(3), x * 4),
        (ByHand(3), x + 1),
    ):
        recalibrate(layer, x.split(5), estimator="pooled")
        assert_close(statistics(layer), direct(inputs))


def test_compiled_model() -> None:
    """A compiled model does not call `F.batch_norm` any more; it runs as it was written meanwhile."""
    model = nn.Sequential(SyncBatchNorm(3))
    compiled = torch.compile(model, backend="eager")
    compiled.eval()(randn(1, 4, 3))
    x = randn(2, 12, 3)
    recalibrate(compiled, [x])
    assert_close(statistics(model[0]), direct(x))


def test_init_affine_inserts_the_identity() -> None:
    """In front of, behind and between what was there: outputs stay as they were, to rounding."""
    torch.manual_seed(0)
    trained = nn.Sequential(nn.Conv2d(5, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    data = [x * 7 + 3 for x in batches()]
    with torch.no_grad():
        want = [trained(x) for x in data]
    inserted = nn.Sequential(
        SyncBatchNorm(5), trained[0], SyncBatchNorm(8, activation="relu"), trained[2], SyncBatchNorm(4, eps=0.1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recalibrate(inserted, data, init_affine=True)
    inserted.eval()
    for x, y in zip(data, want, strict=True):
        torch.testing.assert_close(inserted(x), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    last = inserted[4]
    assert_close(statistics(last), direct(torch.cat(want)))
    assert_same(last.bias.detach(), last.running_mean)
    torch.testing.assert_close(last.weight.detach(), (last.running_var + 0.1).sqrt(), rtol=1e-7, atol=0)
    assert not torch.equal(inserted(data[0] + 1), inserted(data[0]))


def test_nan_stays_in_its_channel() -> None:
    layer = SyncBatchNorm(3)
    x = randn(1, 8, 3, 2)
    x[3, 1, 0] = torch.nan
    with pytest.warns(UserWarning, match="statistics are NaN in {'SyncBatchNorm': 1} channels"):
        recalibrate(layer, [x], estimator="pooled")
    mean, variance = statistics(layer)
    assert mean.isnan().tolist() == variance.isnan().tolist() == [False, True, False]
    recalibrate(layer, [randn(2, 8, 3, 2)], estimator="pooled")  # what was there before does not matter
    assert not layer.running_mean.isnan().any()


# --- What it leaves alone ---------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Everything that a pass could change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 4, 3)
        self.norm = SyncBatchNorm(4)
        self.other = nn.InstanceNorm2d(4, track_running_stats=True)
        self.local = nn.BatchNorm2d(4, track_running_stats=False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        x = self.local(self.other(self.drop(self.norm(self.conv(x)))))
        return F.dropout(x, 0.5, training=True)


@pytest.mark.parametrize("estimator", ["pooled", "batches"])
def test_nothing_else_changes(estimator: str) -> None:
    model = Stateful()
    model.norm.num_batches_tracked += 7
    model.train()
    model.other.eval()
    modes = [m.training for m in model.modules()]
    loader = DataLoader(TensorDataset(torch.cat(batches())), batch_size=8, shuffle=True)  # draws random numbers, too
    before, random = state(model), torch.get_rng_state()
    assert recalibrate(model, loader, estimator=estimator) is model
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    after = state(model)
    assert not torch.equal(after.pop("norm.running_mean"), before.pop("norm.running_mean"))
    assert not torch.equal(after.pop("norm.running_var"), before.pop("norm.running_var"))
    assert_same(after, before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert "call" not in vars(model.norm) and not model.norm._forward_pre_hooks


@pytest.mark.parametrize("options", [{}, {"estimator": "batches"}, {"init_affine": True}, {"layer_by_layer": True}], ids=str)
def test_an_exception_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    class Broken(RuntimeError):
        pass

    calls = []

    def forward(model: nn.Module, x: Tensor) -> None:
        calls.append(model(x))
        if len(calls) == (6 if options.get("layer_by_layer") else 2):  # after the first pass has given new statistics
            raise Broken

    model = network(SyncBatchNorm(4), nn.BatchNorm2d(4))
    model.train()
    before = state(model)
    with pytest.raises(Broken):
        recalibrate(model, batches(), forward=forward, **options)
    assert_same(state(model), before)
    assert all(m.training for m in model.modules())
    assert F.batch_norm(randn(1, 4, 4), torch.zeros(4), torch.ones(4)).shape == (4, 4)


def test_unused_and_frozen_layers() -> None:
    model = nn.ModuleDict({"used": SyncBatchNorm(4), "unused": nn.BatchNorm2d(4), "frozen": SyncBatchNorm(4)})
    freeze_batchnorm(model["frozen"])
    before = state(model["unused"])
    kept = state(model["frozen"])
    with pytest.warns(UserWarning, match=r"keep their statistics: \['unused'\]"):
        recalibrate(model, [randn(1, 5, 4)], forward=lambda m, x: m["frozen"](m["used"](x)))
    assert_same(state(model["unused"]), before)
    assert_same(state(model["frozen"]), kept)
    with pytest.raises(ValueError, match=r"Received: frozen layers \['0'\]"):
        recalibrate(freeze_batchnorm(nn.Sequential(nn.BatchNorm1d(4))), [randn(1, 5, 4)])


def test_a_part_of_a_model() -> None:
    """The layers of `model`, whatever `forward` runs."""
    model = nn.Sequential(SyncBatchNorm(4), nn.Sequential(SyncBatchNorm(4)))
    before = state(model[0])
    x = randn(1, 9, 4)
    recalibrate(model[1], [x], forward=lambda _, x: model.eval()(x))
    assert_same(state(model[0]), before)
    assert_close(statistics(model[1][0]), direct(x / (1 + 1e-5) ** 0.5))


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_kinds_of_batches() -> None:
    x = randn(1, 12, 4, 3, 3)
    labels = torch.arange(12)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = SyncBatchNorm(4)

        def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.norm(pixels)

    class OneMapping(Named):
        def forward(self, inputs: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            return self.norm(inputs["pixels"])

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(x)

    maps = [{"pixels": x[:5], "labels": labels[:5]}, {"pixels": x[5:], "labels": labels[5:]}]
    want = None
    for model, data in (
        (Named(), [x]),
        (Named(), list(x.split(5))),
        (Named(), (part for part in x.split(1))),
        (Named(), [(x[:5], labels[:5]), [x[5:], labels[5:]]]),
        (Named(), DataLoader(TensorDataset(x, labels), batch_size=5)),
        (Named(), DataLoader(Stream(), batch_size=5)),
        (Named(), maps),
        (OneMapping(), maps),
        (Named(), [(maps[0], 1), (maps[1], 1)]),
        (Named(), [x[:0], x]),
    ):
        recalibrate(model, data, estimator="pooled")
        found = statistics(model.norm)
        assert_same(found, want or found)
        want = found
    assert_close(want, direct(x))


def test_a_bar_for_long_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.02)

    def forward(model: nn.Module, x: Tensor) -> None:
        time.sleep(0.03)
        model(x)

    for shown in (True, False):
        recalibrate(SyncBatchNorm(5), batches(), forward=forward, progress=shown)
        assert ("4/4" in capsys.readouterr().err) is shown
    monkeypatch.undo()
    recalibrate(SyncBatchNorm(5), batches())
    assert capsys.readouterr().err == ""


# --- Wrong calls ------------------------------------------------------------------------------------------------------


class Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = SyncBatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.long())


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        ("resnet", [], {}, TypeError, r"expected a torch.nn.Module. Received: str"),
        (nn.Linear(2, 2), [], {}, ValueError, r"no batch norm layer.*Received: Linear"),
        (nn.BatchNorm1d(2, track_running_stats=False), [], {}, ValueError, r"no batch norm layer.*Received: BatchNorm1d"),
        (nn.LazyBatchNorm1d(), [], {}, ValueError, r"no channel count yet.*Received"),
        (SyncBatchNorm(4), [], {}, ValueError, r"no rank has a batch.*Received: batches without"),
        (SyncBatchNorm(4), randn(1, 3, 4), {}, TypeError, r"expected batches to be.*\[batch\]. Received: Tensor"),
        (SyncBatchNorm(4), {"x": 1}, {}, TypeError, r"expected batches to be.*Received: dict"),
        (SyncBatchNorm(4), 7, {}, TypeError, r"expected batches to be.*Received: int"),
        (SyncBatchNorm(4), ["text"], {}, TypeError, r"pass `forward`. Received: str"),
        (SyncBatchNorm(4), [("text", 1)], {}, TypeError, r"Received: tuple beginning with str"),
        (SyncBatchNorm(4), [randn(1, 3, 5)], {}, ValueError, r"expected an input of 4 channels.*Received: 5"),
        (Integers(), [randn(1, 3, 4)], {}, TypeError, r"Received: torch.int64"),
        (
            SyncBatchNorm(4),
            [randn(1, 1, 4)],
            {"estimator": "pooled"},
            ValueError,
            r"1 value per channel in the data.*'SyncBatchNorm'",
        ),
        (SyncBatchNorm(4), [randn(1, 3, 4)[:1]] * 2, {}, ValueError, r"in a global batch.*drop_last"),
        (SyncBatchNorm(4), [randn(1, 3, 4)], {"estimator": "mean"}, ValueError, r"\('pooled', 'batches'\). Received: 'mean'"),
        (SyncBatchNorm(4), [randn(1, 3, 4)], {"forward": 3}, TypeError, r"expected forward to be a function.*Received: int"),
        (SyncBatchNorm(4, affine=False), [], {"init_affine": True}, ValueError, r"weight and bias. Received: layer"),
        (SyncBatchNorm(4), iter([randn(1, 3, 4)]), {"layer_by_layer": True}, ValueError, r"can be read only once"),
        (SyncBatchNorm(4), [], {"layer_by_layer": True, "estimator": "batches"}, ValueError, r"Received: estimator='batches'"),
        (SyncBatchNorm(4), [1], {"forward": lambda m, b: None}, ValueError, r"Check that `forward` runs this model"),
        (SyncBatchNorm(4), [randn(1, 3, 4)[:0]], {}, ValueError, r"no batch reached.*all batches were empty"),
    ],
)
def test_wrong_calls(model: Any, data: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    before = state(model) if isinstance(model, nn.Module) and not isinstance(model, nn.LazyBatchNorm1d) else {}
    with pytest.raises(error, match=message):
        recalibrate(model, data, **options)
    if before:
        assert_same(state(model), before)


def test_randomized_layers_keep_their_parameters() -> None:
    layer = randomize(SyncBatchNorm(4))
    before = copy.deepcopy(layer)
    recalibrate(layer, [randn(1, 6, 4)])
    assert_same([layer.weight, layer.bias], [before.weight, before.bias])
