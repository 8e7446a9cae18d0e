"""fold_batchnorm in PyTorch: what becomes a part of what, what is refused and why, and that outputs are equal.

Tolerance: a folded weight is rounded once (2^-24 of it), and the convolution adds other products than before. The sums here
have up to 100 terms of about 1, so float32 outputs differ by some 1e-6 of their size, float64 ones by 1e-15.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from hvd_syncbn import progress
from hvd_syncbn.torch import Scale, SyncBatchNorm, convert_sync_batchnorm, fold_batchnorm
from tests.torch_tools import assert_same, randn, randomize

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13}


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def kinds(model: nn.Module, cls: type[nn.Module]) -> int:
    return sum(isinstance(module, cls) for module in model.modules())


def assert_close(got: Tensor, want: Tensor) -> None:
    tolerance = TOLERANCE[want.dtype] * float(want.detach().abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def folds(model: nn.Module, *inputs: Tensor, left: int = 0, **options: Any) -> Any:
    """Return the folded model; its outputs are equal, the original does not change, and there is no warning."""
    model.eval()
    before = copy.deepcopy(model.state_dict())
    want = model(*inputs, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = fold_batchnorm(model)
    assert len(norms(folded)) == left
    assert type(folded) is type(model) or isinstance(folded, Scale)
    assert_close(folded(*inputs, **options), want)
    assert_same(dict(model.state_dict()), dict(before))
    assert_same(model(*inputs, **options), want)
    return folded


def refuses(model: nn.Module, *inputs: Tensor, reason: str, name: str = ".*", train: bool = False) -> nn.Module:
    """What is refused is named with its reason, and the outputs are equal all the same."""
    model.train(train)
    want = model.eval()(*inputs)
    model.train(train)
    with pytest.warns(UserWarning, match=rf"'{name}' is not folded: .*{reason}"):
        folded = fold_batchnorm(model)
    assert_close(folded.eval()(*inputs), want)
    return folded


# --- Kinds of layers --------------------------------------------------------------------------------------------------

NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SPATIAL = {1: (9,), 2: (9, 7), 3: (5, 6, 7)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False, "groups": 2, "dilation": 2}, {"stride": 2, "groups": 6}], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("layers", [CONV, TRANSPOSED], ids=["conv", "transposed"])
def test_convolution_then_norm(layers: Any, dims: int, options: dict[str, Any], affine: bool, dtype: torch.dtype) -> None:
    model = randomize(nn.Sequential(layers[dims](6, 12, 3, padding=1, **options), NORM[dims](12, affine=affine, eps=0.01)))
    folded = folds(model.to(dtype), randn(1, 2, 6, *SPATIAL[dims], dtype=dtype))
    assert type(folded[0]) is type(model[0]) and folded[0].bias is not None and isinstance(folded[1], nn.Identity)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "groups": 2, "dilation": 2},
        {"groups": 6, "stride": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "circular"},
        {"padding": "valid"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_norm_then_convolution(dims: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Without padding, or with padding that repeats elements."""
    model = randomize(nn.Sequential(NORM[dims](6), CONV[dims](6, 12, 3, **options))).to(dtype)
    folds(model, randn(1, 2, 6, *SPATIAL[dims], dtype=dtype))


def test_same_padding_of_one_pixel_is_none() -> None:
    folds(randomize(nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, padding="same"))), randn(1, 2, 6, 5, 5))


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    x = randn(1, 7, 5)
    folds(randomize(nn.Sequential(nn.Linear(5, 6, bias=bias), nn.BatchNorm1d(6))), x)
    folds(randomize(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 6, bias=bias))), x)


def test_linear_of_more_dimensions_is_no_silent_mistake() -> None:
    """(N, C, L) -> linear over L, norm over C: where both have 6, only the input tells, and then it is an error."""
    model = randomize(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))).eval()
    with pytest.raises(ValueError, match=r"2 dimensions only.*Received: shape \(2, 6, 6\)"):
        fold_batchnorm(model)(randn(1, 2, 6, 5))
    other = randomize(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(4)))
    refuses(other, randn(1, 2, 4, 5), reason="4 channels, but '0' writes 6 in another dimension")


def test_separable_and_depthwise() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 12, 3, groups=6, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 5, 1, bias=False),
        nn.BatchNorm2d(5),
    )
    folds(randomize(model), randn(1, 2, 6, 8, 8))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [True, False])
def test_fused_activation_and_residual(residual: bool, activation: str | None) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
            self.norm = SyncBatchNorm(6, activation=activation)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x), residual=x) if residual else self.norm(self.conv(x))

    folded = folds(randomize(Block()), randn(1, 2, 6, 8, 8))
    assert kinds(folded, Scale) == 0 and kinds(folded, nn.Conv2d) == 1
    assert isinstance(folded.norm, nn.Identity) == (not residual and activation is None)


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, SyncBatchNorm, nn.SyncBatchNorm])
def test_classes_of_norms(cls: Any) -> None:
    folds(randomize(nn.Sequential(nn.Conv2d(6, 4, 3), cls(4))), randn(1, 2, 6, 8, 8))


def test_scale() -> None:
    """Caffe's chain, conv + norm + Scale, and norm + Scale, and Scale where there is nothing."""
    x = randn(1, 2, 6, 8, 8)
    chain = randomize(nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), Scale(4), nn.ReLU()))
    assert kinds(folds(chain, x), Scale) == 0
    pair = folds(randomize(nn.Sequential(nn.BatchNorm2d(6, affine=False), Scale(6, bias=False))), x)
    assert kinds(pair, Scale) == 1 and isinstance(pair[0], nn.Identity)
    twice = folds(randomize(nn.Sequential(nn.BatchNorm2d(6), SyncBatchNorm(6, activation="relu"))), x)
    assert kinds(twice, Scale) == 1 and twice[1].activation == "relu"
    alone = folds(randomize(nn.BatchNorm2d(6)), x)
    assert isinstance(alone, Scale)
    assert isinstance(folds(randomize(nn.Sequential(nn.ReLU(), SyncBatchNorm(6, activation="relu")))[1:], x)[0], Scale)
    with pytest.warns(UserWarning, match="found no batch norm to fold. Received: Scale"):
        fold_batchnorm(alone)
    assert torch.equal(Scale(6)(x), x)
    with pytest.raises(ValueError, match="Received: 'gelu'"):
        Scale(6, activation="gelu")


def test_norm_and_depthwise_convolution_of_one_pixel() -> None:
    folded = folds(randomize(nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1, groups=6))), randn(1, 2, 6, 4, 4))
    assert kinds(folded, Scale) == 0


# --- Models -----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A ResNet's block, functional relu and addition between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.down = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.down(x))


class PreActivation(nn.Module):
    """norm-relu-conv: the first norm has nothing before it, the second one a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(y)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.ModuleList([Residual(6), PreActivation(6)])
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5, bias=False)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(self.dropout(self.head(x.mean((2, 3)) * scale)))


@pytest.mark.parametrize("converted", [False, True])
def test_a_network(converted: bool) -> None:
    model = randomize(Net())
    model = convert_sync_batchnorm(model) if converted else model
    folded = folds(model, randn(1, 4, 3, 9, 9))
    assert kinds(folded, Scale) == 1 and isinstance(folded.blocks[1].bn1, Scale)
    assert folded.stem[0].weight.is_contiguous(memory_format=torch.contiguous_format)
    assert not folded.training and all(not module.training for module in folded.modules())


class AsksForValues(nn.Module):
    """It cannot be traced, but its parts can."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.tail = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return self.tail(y if y.sum() > 1e9 else -y)


def test_what_cannot_be_traced_is_folded_in_parts() -> None:
    model = randomize(AsksForValues()).eval()
    x = randn(1, 4, 3, 9, 9)
    with pytest.warns(UserWarning, match=r"'AsksForValues' cannot be traced, so its parts.*TraceError") as caught:
        folded = fold_batchnorm(model)
    assert len(caught) == 1 and not norms(folded)
    assert_close(folded(x), model(x))


class Optional(nn.Module):
    """What comes between depends on an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = self.conv(x)
        if gate is not None:
            x = x * gate
        return self.norm(x)


def test_arguments_that_change_the_order() -> None:
    model, x, gate = randomize(Optional()).eval(), randn(1, 2, 3, 5, 5), randn(2, 2, 4, 3, 3)
    folded = refuses(model, x, reason="depends on the arguments", name="norm")
    assert_close(folded(x, gate), model(x, gate))


class Flag(Optional):
    def forward(self, x: Tensor, early: bool = False) -> Tensor:  # type: ignore[override]
        x = self.conv(x)
        return x if early else self.norm(x)


def test_flags_that_a_trace_cannot_follow() -> None:
    model = randomize(Flag()).eval()
    with pytest.warns(UserWarning, match="only with the defaults of early"):
        folded = fold_batchnorm(model)
    assert_close(folded(randn(1, 2, 3, 5, 5)), model(randn(1, 2, 3, 5, 5)))


def test_marks_of_a_trace_stay_off_the_model() -> None:
    class Remembers(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    model = randomize(Remembers(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():  # else PyTorch itself refuses to copy the model
        folded = folds(model, randn(1, 2, 3, 5, 5))
    assert type(folded.last) is Tensor and type(model.last) is Tensor


def test_channels_last_stays() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(memory_format=torch.channels_last)
    folded = folds(model, randn(1, 2, 3, 5, 5))
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_identity_and_dropout_do_not_keep_them_apart() -> None:
    folds(randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Dropout(0.5), nn.BatchNorm2d(4))), randn(1, 2, 3, 5, 5))


def test_shared_weight_of_two_layers() -> None:
    """Each gets its own."""
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model[3].weight = model[0].weight
    folds(model, randn(1, 2, 4, 5, 5))


# --- Refusals ---------------------------------------------------------------------------------------------------------

X = randn(1, 2, 4, 6, 6)


class Shared(nn.Module):
    """One convolution, two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.conv(x)) + self.b(self.conv(x + 1))


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.one(x)) + self.norm(self.two(x))


class Tapped(nn.Module):
    """The convolution's output is returned, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), SyncBatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y.exp()


class OwnResidual(Tapped):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y, residual=y)


class ReadsWeight(Tapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv.weight.mean()


class Never(Tapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class MyConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class MyNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(index: int) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[index].register_forward_hook(lambda module, args, output: output + 1)
    return model


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (Shared, "[ab]", "'conv' is shared"),
        (SharedNorm, "norm", "it is shared"),
        (Tapped, "norm", "the output of 'conv' is used elsewhere, too"),
        (OwnResidual, "norm", "the output of 'conv' is used elsewhere, too"),
        (ReadsWeight, "norm", "the weight of 'conv' is used elsewhere, too"),
        (Never, "norm", "forward does not call it"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), "2", "'1' lies between '0' and it"),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4)),
            "3",
            "'1', '2' lies between '0' and it",
        ),
        (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), "0", "'1' after it pads with zeros"),
        (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding="same")), "0", "'1' after it pads with zeros"),
        (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3)), "0", "a transposed convolution"),
        (lambda: nn.Sequential(MyConv(4, 4, 3), nn.BatchNorm2d(4)), "1", "'0' is a MyConv, which may do more"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), MyNorm(4)), "1", "a MyNorm may do more"),
        (lambda: hooked(0), "1", "'0' has hooks"),
        (lambda: hooked(1), "1", "it has hooks"),
        (
            lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)),
            "1",
            "'0' is (a Parametrized|parametrized)",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
            "1",
            "no running statistics",
        ),
    ],
)  # fmt: skip
def test_refusals(make: Any, name: str, reason: str) -> None:
    model = randomize(make())
    folded = refuses(model, X, name=name, reason=reason)
    assert norms(folded) == norms(model)


def test_training_mode() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    folded = refuses(model, X, name="1", reason="training mode. Call model.eval", train=True)
    assert norms(folded) == ["1"]
    # In evaluation itself, while the convolution before it learns.
    model.train()
    model[1].eval()
    with pytest.warns(UserWarning, match="'1' is not folded: (it|'0') is being trained"):
        fold_batchnorm(model)


def test_a_refused_norm_that_holds_another() -> None:
    """norm, norm, padded convolution: the first is merged into the second, which then cannot stay unchanged."""
    model = randomize(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)))
    folded = folds(model, X)
    assert isinstance(folded[0], nn.Identity) and isinstance(folded[1], Scale)


def test_a_norm_between_two_convolutions_takes_the_one_that_can() -> None:
    folds(randomize(nn.Sequential(MyConv(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))), X)


def test_weights_too_large_for_float16() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).half().eval()
    with torch.no_grad():
        model[0].weight.fill_(1000.0)
        model[1].weight.fill_(1000.0)
    with pytest.warns(UserWarning, match="'1' is not folded: the weights of '0' would be too large for torch.float16"):
        assert norms(fold_batchnorm(model)) == ["1"]


def test_wrong_calls() -> None:
    for wrong in (None, nn.BatchNorm2d, {}, torch.zeros(3)):
        with pytest.raises(TypeError, match=r"expected a torch.nn.Module. Received: "):
            fold_batchnorm(wrong)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="found no batch norm to fold. Received: Linear"):
        fold_batchnorm(nn.Linear(3, 3))


def test_lazy() -> None:
    with pytest.raises(ValueError, match=r"the lazy layer '1' .*Received: LazyBatchNorm2d"):
        fold_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()).eval())


def test_a_trace_sees_through_scripted_code_of_others() -> None:
    """Attention, functional and reshapes around: what has nothing to do with norms may be anything that fx traces."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x)).transpose(1, 2)
            return self.attention(y, y, y)[0]

    folds(randomize(Mixed()), randn(1, 2, 4, 6))


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("variable", progress.RANK_VARIABLES)
def test_progress(variable: str, rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar where it takes long, on the first rank."""
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setenv(variable, rank)
    fold_batchnorm(randomize(Net()).eval())
    assert ("Folding batch norms" in capsys.readouterr().err) == (rank == "0")
