"""Batch norm state between PyTorch and Keras, and from Caffe's blobs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import hvd_syncbn.keras
import hvd_syncbn.torch
from hvd_syncbn.exchange import BatchNormState, complement, from_caffe, scale_and_shift
from hvd_syncbn.keras import SyncBatchNormalization
from hvd_syncbn.torch import SyncBatchNorm
from tests.arrays import same_bits

CHANNELS = 5
VECTORS = ("gamma", "beta", "mean", "variance")


def state(gamma: bool = True, beta: bool = True, channels: int = CHANNELS, **options: Any) -> BatchNormState:
    rng = np.random.default_rng(0)
    a, b, mean, variance = (rng.standard_normal(channels).astype(np.float32) for _ in VECTORS)
    return BatchNormState(
        a if gamma else None,
        b if beta else None,
        mean,
        variance**2 + np.float32(0.1),
        **{"epsilon": 2e-4, "momentum": 0.3, "unbiased": True} | options,
    )


def assert_same(a: BatchNormState, b: BatchNormState, unbiased: bool = True) -> None:
    for name in VECTORS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        assert x is None or same_bits(x, y), name
    assert (a.epsilon, a.momentum) == (b.epsilon, b.momentum)
    assert a.unbiased == b.unbiased or not unbiased


def torch_layer(cls: Any, gamma: bool = True, beta: bool = True) -> nn.Module:
    layer: nn.Module = cls(CHANNELS, affine=gamma or beta)
    for name, wanted in (("weight", gamma), ("bias", beta)):
        if not wanted:
            layer.register_parameter(name, None)
    return layer


def keras_layer(cls: Any, gamma: bool = True, beta: bool = True, **options: Any) -> Any:
    layer = cls(scale=gamma, center=beta, **options)
    layer.build((None, CHANNELS))
    return layer


TORCH = (SyncBatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
KERAS = (SyncBatchNormalization, layers.BatchNormalization)


@pytest.mark.parametrize("beta", [True, False])
@pytest.mark.parametrize("gamma", [True, False])
@pytest.mark.parametrize("theirs", KERAS)
@pytest.mark.parametrize("ours", TORCH)
def test_there_and_back(ours: Any, theirs: Any, gamma: bool, beta: bool) -> None:
    """PyTorch -> Keras -> PyTorch, and the other way round: every byte, and 0.3 stays 0.3."""
    want = state(gamma, beta)
    a, b, c = torch_layer(ours, gamma, beta), keras_layer(theirs, gamma, beta), torch_layer(ours, gamma, beta)
    hvd_syncbn.torch.set_state(a, want)
    assert_same(hvd_syncbn.torch.get_state(a), want)
    hvd_syncbn.keras.set_state(b, hvd_syncbn.torch.get_state(a))
    assert_same(hvd_syncbn.keras.get_state(b), want, unbiased=theirs is SyncBatchNormalization)
    assert b.momentum == 0.7
    hvd_syncbn.torch.set_state(c, hvd_syncbn.keras.get_state(b))
    assert_same(hvd_syncbn.torch.get_state(c), want)
    assert (c.eps, c.momentum) == (2e-4, 0.3)


def test_a_step_after_the_exchange_has_the_same_bytes() -> None:
    """In the layers of this project, with PyTorch's unbiased variance in both."""
    import horovod.tensorflow
    import horovod.torch

    horovod.torch.init()
    horovod.tensorflow.init()
    ours, theirs = SyncBatchNorm(CHANNELS), keras_layer(SyncBatchNormalization)
    hvd_syncbn.keras.set_state(theirs, state(momentum=0.01))
    hvd_syncbn.torch.set_state(ours, hvd_syncbn.keras.get_state(theirs))
    x = np.random.default_rng(1).standard_normal((7, CHANNELS)).astype(np.float32)
    assert same_bits(ours(torch.from_numpy(x)).detach().numpy(), theirs(x, training=True))
    got, want = hvd_syncbn.torch.get_state(ours), hvd_syncbn.keras.get_state(theirs)
    assert_same(got, want)
    assert not same_bits(got.mean, state().mean)


@pytest.mark.parametrize("gamma", [True, False])
def test_evaluation_after_the_exchange(gamma: bool) -> None:
    """Of each framework's own kernels, whose roundings differ: a few of 6e-8 of values of up to 4."""
    ours, theirs = torch_layer(nn.BatchNorm2d, gamma), keras_layer(layers.BatchNormalization, gamma)
    hvd_syncbn.torch.set_state(ours, state(gamma))
    hvd_syncbn.keras.set_state(theirs, hvd_syncbn.torch.get_state(ours))
    x = np.random.default_rng(1).standard_normal((2, 4, 3, CHANNELS)).astype(np.float32)
    y = ours.eval()(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1).detach().numpy()
    np.testing.assert_allclose(theirs(x.reshape(-1, CHANNELS)), y.reshape(-1, CHANNELS), rtol=1e-5, atol=1e-6)


def test_parameters_are_written_in_place() -> None:
    layer = nn.BatchNorm2d(CHANNELS)
    tensors = [*layer.parameters(), *layer.buffers()]
    hvd_syncbn.torch.set_state(layer, state())
    assert all(a is b for a, b in zip(tensors, [*layer.parameters(), *layer.buffers()], strict=True))
    assert layer.num_batches_tracked == 0 and layer.weight.requires_grad
    copy = hvd_syncbn.torch.get_state(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert copy.gamma is not None and copy.gamma.all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer = nn.BatchNorm2d(CHANNELS, dtype=dtype)
    hvd_syncbn.torch.set_state(layer, state())
    assert layer.weight.dtype == dtype
    got = hvd_syncbn.torch.get_state(layer)
    assert same_bits(got.gamma, torch.tensor(state().gamma).to(dtype).float().numpy())
    layer = keras_layer(SyncBatchNormalization, dtype=str(dtype).removeprefix("torch."))
    hvd_syncbn.keras.set_state(layer, got)
    assert_same(hvd_syncbn.keras.get_state(layer), got)


def test_average_over_all_batches() -> None:
    layer = SyncBatchNorm(CHANNELS, momentum=None)
    layer.num_batches_tracked.fill_(7)
    assert hvd_syncbn.torch.get_state(layer).momentum is None
    hvd_syncbn.torch.set_state(layer, state(momentum=None))
    assert layer.momentum is None and layer.num_batches_tracked == 7
    with pytest.raises(ValueError, match=r"an average over all batches.*Received: momentum=None for layer 'norm'"):
        hvd_syncbn.keras.set_state(keras_layer(layers.BatchNormalization, name="norm"), state(momentum=None))


# --- Caffe ------------------------------------------------------------------------------------------------------------


def caffe(batches: list[np.ndarray], fraction: float = 0.999) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Caffe's blobs after these batches, as batch_norm_layer.cpp has it."""
    mean, variance, factor = np.zeros(CHANNELS), np.zeros(CHANNELS), 0.0
    for x in batches:
        factor = factor * fraction + 1
        mean = fraction * mean + x.mean(0)
        variance = fraction * variance + len(x) / (len(x) - 1) * x.var(0)
    return mean.astype(np.float32), variance.astype(np.float32), np.array([factor], np.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_caffe(scale: bool, bias: bool) -> None:
    """With and without a Scale layer; the outputs are those of Caffe's two layers, within a few float32 roundings of 1."""
    rng = np.random.default_rng(2)
    blobs = caffe([rng.normal(3, 2, (6, CHANNELS)) for _ in range(9)])
    gamma, beta = (rng.standard_normal(CHANNELS).astype(np.float32) for _ in range(2))
    got = from_caffe(*blobs, gamma if scale else None, beta if bias else None)
    x = rng.normal(3, 2, (4, CHANNELS)).astype(np.float32)
    want = (x - blobs[0] / blobs[2]) / np.sqrt(blobs[1] / blobs[2] + 1e-5)
    want = want * (gamma if scale else 1) + (beta if bias else 0)
    ours = SyncBatchNorm(CHANNELS).eval()
    hvd_syncbn.torch.set_state(ours, got)
    np.testing.assert_allclose(ours(torch.from_numpy(x)).detach(), want, rtol=1e-5, atol=1e-5)
    theirs = keras_layer(SyncBatchNormalization)
    hvd_syncbn.keras.set_state(theirs, got)
    np.testing.assert_allclose(theirs(x), want, rtol=1e-5, atol=1e-5)
    assert theirs.momentum == 0.999 and theirs.unbiased_variance
    assert (ours.momentum, ours.eps) == (0.001, 1e-5)


def test_caffe_before_the_first_batch() -> None:
    got = from_caffe(np.ones(3), np.ones(3), 0.0)
    assert not got.mean.any() and not got.variance.any()


@pytest.mark.parametrize("factor", [np.ones(2), -1.0, np.nan, np.inf])
def test_caffe_bad_factor(factor: Any) -> None:
    with pytest.raises(ValueError, match=r"one finite scale_factor.*Received: "):
        from_caffe(np.ones(3), np.ones(3), factor)


# --- Wrong calls ------------------------------------------------------------------------------------------------------

ONES = np.ones(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones(2), ONES, ONES, ONES, 0.1, 0.1, True), ValueError, "gamma to have 3 values, as mean has. Received: 2"),
        ((ONES, np.ones((1, 3)), ONES, ONES, 0.1, 0.1, True), ValueError, r"for beta. Received: shape \(1, 3\)"),
        ((None, None, 1.0, ONES, 0.1, 0.1, True), ValueError, r"for mean. Received: shape \(\)"),
        ((None, None, None, ONES, 0.1, 0.1, True), TypeError, "for mean. Received: object NoneType"),
        ((None, None, ONES, -ONES, 0.1, 0.1, True), ValueError, "variance of at least 0. Received: -1"),
        ((None, None, ONES, ONES * 1j, 0.1, 0.1, True), TypeError, "for variance. Received: complex128"),
        ((["a"] * 3, None, ONES, ONES, 0.1, 0.1, True), TypeError, "for gamma. Received: <U1 list"),
        ((None, None, ONES, ONES, -0.1, 0.1, True), ValueError, "epsilon to be at least 0. Received: -0.1"),
        ((None, None, ONES, ONES, None, 0.1, True), TypeError, "number for epsilon. Received: None"),
        ((None, None, ONES, ONES, 0.1, 1.5, True), ValueError, "momentum to be between 0 and 1. Received: 1.5"),
        ((None, None, ONES, ONES, 0.1, "0.1", True), TypeError, "number for momentum. Received: '0.1'"),
        ((None, None, ONES, ONES, 0.1, 0.1, 1), TypeError, "bool for unbiased. Received: 1"),
    ],
)
def test_bad_states(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BatchNormState(*arguments)


def test_takes_what_is_like_an_array() -> None:
    got = BatchNormState(torch.ones(3), [0, 1, 2], np.ones(3, ml_dtypes.bfloat16), (4.0, 5.0, 6.0), 0, np.float32(0.5), False)
    assert all(getattr(got, name).dtype == np.float32 for name in VECTORS)
    assert got.momentum == 0.5


def test_layers_that_cannot_hold_a_state() -> None:
    """And they are left as they were."""
    want = state()
    plain = torch_layer(nn.BatchNorm2d, gamma=False, beta=True)
    with pytest.raises(ValueError, match=r"the layer BatchNorm2d\(5.*has no gamma.*Received: gamma="):
        hvd_syncbn.torch.set_state(plain, want)
    assert not plain.running_mean.any()
    with pytest.raises(ValueError, match=r"'norm' has no beta.*Received: beta="):
        hvd_syncbn.keras.set_state(keras_layer(SyncBatchNormalization, True, False, name="norm"), want)
    with pytest.raises(ValueError, match=r"has 5 channels. Received: a state of 4"):
        hvd_syncbn.torch.set_state(nn.BatchNorm2d(5), state(channels=4))
    with pytest.raises(ValueError, match=r"'norm' has 5 channels. Received: a state of 4"):
        hvd_syncbn.keras.set_state(keras_layer(SyncBatchNormalization, name="norm"), state(channels=4))
    for call in (hvd_syncbn.torch.get_state, lambda layer: hvd_syncbn.torch.set_state(layer, want)):
        with pytest.raises(ValueError, match=r"no running statistics.*Received: BatchNorm2d"):
            call(nn.BatchNorm2d(5, track_running_stats=False))
        with pytest.raises(ValueError, match=r"no channel count yet.*Received: LazyBatchNorm2d"):
            call(nn.LazyBatchNorm2d())
        with pytest.raises(TypeError, match="Received: InstanceNorm2d"):
            call(nn.InstanceNorm2d(5))
        with pytest.raises(TypeError, match="Received: NoneType"):
            call(None)
    for call in (hvd_syncbn.keras.get_state, lambda layer: hvd_syncbn.keras.set_state(layer, want)):
        with pytest.raises(ValueError, match=r"no weights yet.*Received: layer 'norm'"):
            call(layers.BatchNormalization(name="norm"))
        with pytest.raises(TypeError, match="Received: LayerNormalization of keras"):
            call(layers.LayerNormalization())
        with pytest.raises(TypeError, match="Received: BatchNorm2d of torch"):
            call(nn.BatchNorm2d(3))
    if hasattr(layers.BatchNormalization(), "renorm"):  # newer than Keras 3.12
        with pytest.raises(ValueError, match=r"state of batch renormalization.*Received: layer 're'"):
            hvd_syncbn.keras.set_state(keras_layer(layers.BatchNormalization, renorm=True, name="re"), want)
    with pytest.raises(TypeError, match=r"expected a BatchNormState. Received: dict"):
        hvd_syncbn.torch.set_state(nn.BatchNorm2d(5), {})
    with pytest.raises(TypeError, match=r"Expected a BatchNormState. Received: dict"):
        hvd_syncbn.keras.set_state(keras_layer(SyncBatchNormalization), {})


def test_what_a_state_has_not_is_one_and_zero() -> None:
    """And a layer without gamma takes a state whose gamma is 1."""
    bare = state(gamma=False, beta=False)
    layer, other = nn.BatchNorm2d(CHANNELS), keras_layer(SyncBatchNormalization)
    with torch.no_grad():
        layer.weight.fill_(3), layer.bias.fill_(3)
    hvd_syncbn.torch.set_state(layer, bare)
    other.gamma.assign(np.full(CHANNELS, 3.0))
    hvd_syncbn.keras.set_state(other, bare)
    for got in (hvd_syncbn.torch.get_state(layer), hvd_syncbn.keras.get_state(other)):
        assert (got.gamma == 1).all() and not got.beta.any()  # type: ignore[union-attr]
        hvd_syncbn.torch.set_state(torch_layer(nn.BatchNorm2d, False, False), got)
        hvd_syncbn.keras.set_state(keras_layer(SyncBatchNormalization, False, False), got)


# --- Conventions ------------------------------------------------------------------------------------------------------


def test_complement_is_its_own_inverse() -> None:
    for momentum in (0.1, 0.01, 0.001, 0.3, 0.99, 0.999, 0.0, 1.0, 1e-3, 0.25, 1 / 3):
        assert complement(complement(momentum)) == momentum
        # The two numbers that the protocol rounds to float32.
        assert np.float32(complement(momentum)) == np.float32(1 - momentum)


def test_scale_and_shift() -> None:
    s = state()
    scale, shift = scale_and_shift(s.gamma, s.beta, s.mean, s.variance, s.epsilon)
    x = np.linspace(-2, 2, 9)[:, None]
    gamma, beta, mean, variance = (getattr(s, name).astype(np.float64) for name in VECTORS)
    np.testing.assert_allclose(scale * x + shift, (x - mean) / np.sqrt(variance + 2e-4) * gamma + beta, rtol=1e-12, atol=1e-12)
