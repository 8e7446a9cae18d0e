"""Batch renormalization: both frameworks against each other and against Keras's own layer, in one process.

Cases of Keras 3.15's tests of its layer are those whose names begin with `test_keras`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import horovod.tensorflow
import horovod.torch
import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras import layers
from torch import nn
from torch.utils.checkpoint import checkpoint

import hvd_syncbn.keras
import hvd_syncbn.torch
from hvd_syncbn.keras import SyncBatchNormalization
from hvd_syncbn.renorm import bounds_of
from hvd_syncbn.torch import SyncBatchNorm
from tests.arrays import same_bits
from tests.torch_tools import assert_same

pytestmark = pytest.mark.skipif(
    not hasattr(layers.BatchNormalization(), "renorm"), reason="needs a Keras that has batch renormalization"
)
CLIPPING = {"rmax": 1.4, "rmin": 0.6, "dmax": 0.3}
STATISTICS = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")


@pytest.fixture(scope="module", autouse=True)
def horovod_() -> None:
    horovod.torch.init()
    horovod.tensorflow.init()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def keras_layer(cls: Any = SyncBatchNormalization, channels: int = 5, **options: Any) -> Any:
    layer = cls(renorm=True, renorm_clipping=CLIPPING, renorm_momentum=0.8, **options)
    layer.build((None, 4, channels))
    for seed, variable in enumerate(layer.trainable_weights):
        variable.assign(normal(channels, seed=seed))
    return layer


def torch_layer(channels: int = 5, **options: Any) -> SyncBatchNorm:
    layer = SyncBatchNorm(channels, 1e-3, 0.01, renorm=True, renorm_clipping=CLIPPING, renorm_momentum=0.2, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.from_numpy(normal(channels, seed=seed)))
    return layer


def statistics(layer: Any) -> list[np.ndarray]:
    if isinstance(layer, SyncBatchNorm):
        return [t.numpy().copy() for t in layer._renorm_statistics()]
    return [getattr(layer, name).numpy() for name in STATISTICS]


def keras_step(layer: Any, x: np.ndarray, dy: np.ndarray, **options: Any) -> list[np.ndarray]:
    """Output, gradients of x and of the weights, statistics."""
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = layer(inputs, training=True, **options)
    weights = [v.value for v in layer.trainable_weights]
    gradients = tape.gradient(y, [inputs, *weights], output_gradients=tf.constant(dy, y.dtype))
    return [y.numpy(), *(g.numpy() for g in gradients), *statistics(layer)]


def torch_step(layer: SyncBatchNorm, x: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
    inputs = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).requires_grad_()
    y = layer(inputs)
    parameters = list(layer.parameters())
    dx, *gradients = torch.autograd.grad(y, [inputs, *parameters], torch.from_numpy(np.moveaxis(dy, -1, 1).copy()))
    tensors = [np.moveaxis(t.detach().numpy(), 1, -1) for t in (y, dx)]
    return [*tensors, *(g.numpy() for g in gradients), *statistics(layer)]


def steps(count: int = 4) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for i in range(count):
        yield normal(6, 4, 5, seed=10 + i) * (1 + i) + np.float32(i / 2), normal(6, 4, 5, seed=20 + i)


@pytest.mark.parametrize("affine", [True, False])
def test_frameworks_have_equal_bytes_and_keras_equal_numbers(affine: bool) -> None:
    """Keras computes in float32, so it differs by some roundings of its own."""
    options = {"center": affine, "scale": affine}
    ours, theirs = keras_layer(**options), keras_layer(layers.BatchNormalization, **options)
    in_torch = torch_layer(affine=affine)
    for x, dy in steps():
        got, want, twin = keras_step(ours, x, dy), keras_step(theirs, x, dy), torch_step(in_torch, x, dy)
        assert len(got) == len(want) == len(twin)
        for a, b, c in zip(got, want, twin, strict=True):
            assert same_bits(a, c)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    y = in_torch.eval()(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).detach().numpy()
    np.testing.assert_allclose(np.moveaxis(y, 1, -1), ours(x), rtol=1e-5, atol=1e-5)


def test_clipping_is_used() -> None:
    """Here r is 2 and d is 5 without bounds."""
    x = np.array([[3.0], [7.0]], np.float32)
    for bounds, r, d in ((None, 2, 5), ({"rmax": 1.5}, 1.5, 5), ({"dmax": 1.0}, 2, 1), ({"rmin": 3.0}, 3, 5)):
        layer = SyncBatchNormalization(epsilon=0.0, renorm=True, renorm_clipping=bounds)
        np.testing.assert_array_equal(layer(x, training=True), [[-r + d], [r + d]])
        twin = SyncBatchNorm(1, eps=0.0, renorm=True, renorm_clipping=bounds)
        np.testing.assert_array_equal(twin(torch.from_numpy(x)).detach(), [[-r + d], [r + d]])


def test_weights_of_the_averages() -> None:
    """A momentum weighs what evaluation uses, a renorm momentum what r and d use."""
    x = torch.tensor([[3.0], [7.0]])
    layer = SyncBatchNorm(1, eps=0.0, momentum=0.5, renorm=True, renorm_momentum=0.25)
    layer(x)
    assert [v.item() for v in layer._renorm_statistics()] == [2.5, 2.25, 1.5, 1.25, 1.25]


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 4, 3)])
def test_keras_basics(shape: tuple[int, ...]) -> None:
    for bounds in (None, {"rmax": 3.0, "rmin": 0.3, "dmax": 5.0}):
        layer = SyncBatchNormalization(renorm=True, renorm_clipping=bounds)
        y = layer(normal(*shape), training=True)
        assert y.shape == shape and y.dtype == "float32"
        assert [w.name for w in layer.trainable_weights] == ["gamma", "beta"]
        assert [w.name for w in layer.non_trainable_weights] == list(STATISTICS)
        assert layer.supports_masking


@pytest.mark.parametrize(
    "bounds", [{"random_key": 1.0}, {"rmax": 0.0, "rmin": 1.0}, {"rmax": 1.0, "dmax": -1.0}, {"rmax": -1.0}]
)
def test_keras_invalid_clipping(bounds: dict[str, float]) -> None:
    for make in (
        lambda: SyncBatchNormalization(renorm=True, renorm_clipping=bounds),
        lambda: SyncBatchNorm(3, renorm=True, renorm_clipping=bounds),
    ):
        with pytest.raises(ValueError, match=r"in renorm_clipping. Received: \{'r"):
            make()


def test_keras_stddev_initializer() -> None:
    layer = SyncBatchNormalization(renorm=True, moving_variance_initializer=keras.initializers.Constant(4.0))
    layer.build((None, 5))
    np.testing.assert_array_equal(layer.moving_stddev, np.full(5, 2, np.float32))
    np.testing.assert_array_equal(layer.renorm_stddev, np.full(5, 2, np.float32))


def test_keras_inference() -> None:
    plain, ours = SyncBatchNormalization(), SyncBatchNormalization(renorm=True)
    for layer in (plain, ours):
        layer.build((None, 10))
        for seed, name in enumerate(("gamma", "beta", "moving_mean", "moving_variance")):
            getattr(layer, name).assign(np.abs(normal(10, seed=seed)))
    assert same_bits(plain(normal(4, 10)).numpy(), ours(normal(4, 10)).numpy())


def test_keras_correctness() -> None:
    """By the paper's formulas in float64."""
    epsilon, momentum, renorm_momentum = 1e-3, 0.9, 0.8
    layer = SyncBatchNormalization(epsilon=epsilon, momentum=momentum, renorm=True, renorm_momentum=renorm_momentum)
    layer.build((None, 3))
    for seed, weight in enumerate(layer.weights):
        weight.assign(np.abs(normal(3, seed=seed)) + 0.5)
    gamma, beta, mean, _, stddev, renorm_mean, renorm_stddev = (w.numpy().astype(np.float64) for w in layer.weights)
    x = np.array([[4.0, 6.0, 2.0], [8.0, -2.0, 5.0], [6.0, 4.0, 3.0]], np.float32)
    batch_mean, batch_stddev = x.mean(0), np.sqrt(x.astype(np.float64).var(0) + epsilon)
    want = ((x - renorm_mean) / renorm_stddev) * gamma + beta  # without bounds, r and d take away the batch's statistics
    np.testing.assert_allclose(layer(x, training=True), want, rtol=1e-6, atol=1e-6)
    new = [
        mean * momentum + batch_mean * (1 - momentum),
        (stddev * momentum + batch_stddev * (1 - momentum)) ** 2 - epsilon,
        stddev * momentum + batch_stddev * (1 - momentum),
        renorm_mean * renorm_momentum + batch_mean * (1 - renorm_momentum),
        renorm_stddev * renorm_momentum + batch_stddev * (1 - renorm_momentum),
    ]
    for got, expected in zip(statistics(layer), new, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_keras_serialization(tmp_path: Path) -> None:
    """And files can be exchanged with Keras's layer in both directions."""
    ours, theirs = keras_layer(), keras_layer(layers.BatchNormalization)
    assert SyncBatchNormalization.from_config(ours.get_config()).get_config() == ours.get_config()
    x, dy = next(steps())
    for source, target in ((ours, layers.BatchNormalization), (theirs, SyncBatchNormalization)):
        keras_step(source, x, dy)
        built = keras_layer(target)
        keras.Sequential([keras.Input((4, 5)), source]).save_weights(tmp_path / "model.weights.h5")
        keras.Sequential([keras.Input((4, 5)), built]).load_weights(tmp_path / "model.weights.h5")
        for a, b in zip(source.weights, built.weights, strict=True):
            assert a.name == b.name and same_bits(a.numpy(), b.numpy())
    model = keras.Sequential([keras.Input((4, 5)), ours])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").layers[0]
    assert type(loaded) is SyncBatchNormalization
    for a, b in zip(keras_step(loaded, x, dy), keras_step(ours, x, dy), strict=True):
        assert same_bits(a, b)


def test_keras_mixed_precision() -> None:
    x, dy = next(steps())
    half, whole = keras_layer(dtype="mixed_float16"), keras_layer()
    got, want = keras_step(half, x, dy), keras_step(whole, x.astype(np.float16).astype(np.float32), dy.astype(np.float16))
    assert got[0].dtype == np.float16 and {a.dtype for a in got[2:]} == {np.dtype(np.float32)}
    assert same_bits(got[0], want[0].astype(np.float16))
    for a, b in zip(statistics(half), statistics(whole), strict=True):
        assert same_bits(a, b)


def test_convert_and_revert_keras() -> None:
    model = keras.Sequential([keras.Input((4, 5)), keras_layer(layers.BatchNormalization)])
    reference = keras_layer()
    hvd_syncbn.keras.convert_sync_batchnorm(model)
    layer = model.layers[0]
    assert type(layer) is SyncBatchNormalization
    x, dy = next(steps())
    for a, b in zip(keras_step(layer, x, dy), keras_step(reference, x, dy), strict=True):
        assert same_bits(a, b)
    hvd_syncbn.keras.revert_sync_batchnorm(model)
    assert type(layer) is layers.BatchNormalization and layer.renorm
    for a, b in zip(statistics(layer), statistics(reference), strict=True):
        assert same_bits(a, b)


def test_fit() -> None:
    """Compiled by Keras, as eagerly."""
    results = []
    for eagerly in (True, False):
        model = keras.Sequential([keras.Input((4, 5)), keras_layer()])
        model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=eagerly)
        x = np.concatenate([x for x, _ in steps()])
        model.fit(x, x * 2, batch_size=6, epochs=2, shuffle=False, verbose=0)
        results.append(statistics(model.layers[0]))
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


def test_state_dict_and_copies() -> None:
    assert set(SyncBatchNorm(5).state_dict()) == set(nn.BatchNorm1d(5).state_dict())
    layer = torch_layer()
    x, dy = next(steps())
    torch_step(layer, x, dy)
    added = {"running_stddev", "renorm_mean", "renorm_stddev"}
    assert set(layer.state_dict()) == set(nn.BatchNorm1d(5).state_dict()) | added
    fresh = SyncBatchNorm(5, 1e-3, 0.01, renorm=True, renorm_clipping=CLIPPING, renorm_momentum=0.2)
    fresh.load_state_dict(layer.state_dict())
    want = torch_step(copy.deepcopy(layer), x, dy)
    for twin in (fresh, pickle.loads(pickle.dumps(layer)), layer):
        for a, b in zip(torch_step(twin, x, dy), want, strict=True):
            assert same_bits(a, b)
    assert "renorm=True, renorm_clipping={'rmax': 1.4" in repr(layer) and "renorm_momentum=0.2" in repr(layer)
    assert "renorm" not in repr(SyncBatchNorm(5))
    layer.reset_running_stats()
    assert [v[0].item() for v in layer._renorm_statistics()] == [0, 1, 1, 0, 1]


def test_evaluation_is_plain_torch() -> None:
    layer = torch_layer()
    torch_step(layer, *next(steps()))
    layer.eval()
    plain = nn.BatchNorm1d(5, 1e-3)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k in plain.state_dict()})
    x = torch.from_numpy(normal(4, 5, 3))
    assert_same(layer(x), plain.eval()(x))
    assert_same(torch.jit.script(layer)(x), layer(x))
    assert_same(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_compiled() -> None:
    torch.compiler.reset()
    eager, layer = torch_layer(activation="relu"), torch_layer(activation="relu")
    compiled: Any = torch.compile(layer, fullgraph=True)
    for x, dy in steps(2):
        results = []
        for call, own in ((eager, eager), (compiled, layer)):
            leaf = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).requires_grad_()
            y = call(leaf)
            y.backward(torch.from_numpy(np.moveaxis(dy, -1, 1).copy()))
            results.append([y.detach(), leaf.grad, *own._renorm_statistics()])
        assert_same(*results)
    torch.compiler.reset()


def test_convert_and_revert_torch() -> None:
    model = nn.Sequential(torch_layer())
    assert hvd_syncbn.torch.convert_sync_batchnorm(model)[0].renorm
    with pytest.warns(UserWarning, match=r"'0' no longer does batch renormalization.*Received: renorm=True"):
        hvd_syncbn.torch.revert_sync_batchnorm(model)
    assert set(model[0].state_dict()) == set(nn.BatchNorm1d(5).state_dict())
    assert not hasattr(model[0], "renorm")


def test_second_derivatives() -> None:
    """r and d are constants in gradients, so finite differences need them constant: rmin = rmax, dmax = 0."""
    layer = SyncBatchNorm(3, momentum=0.0, renorm=True, renorm_clipping={"rmin": 1.5, "rmax": 1.5, "dmax": 0.0}).double()
    x = torch.from_numpy(normal(4, 3).astype(np.float64)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x), x)


def test_inside_a_checkpoint() -> None:
    layer = torch_layer()
    x = torch.from_numpy(normal(4, 5)).requires_grad_()
    for reentrant in (True, False):
        with pytest.raises(RuntimeError, match=r"renormalization inside a checkpoint.*Leave the layer out"):
            checkpoint(layer, x, use_reentrant=reentrant)
    with torch.inference_mode():
        layer(x)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_channels_that_are_not_finite_keep_their_statistics(value: float) -> None:
    x, dy = next(steps())
    spoiled = x.copy()
    spoiled[0, 0, 2] = value
    for layer, twin, step in ((keras_layer(), keras_layer(), keras_step), (torch_layer(), torch_layer(), torch_step)):
        before = statistics(layer)
        run: Callable[..., list[np.ndarray]] = step
        y = run(layer, spoiled, dy)[0]
        run(twin, x, dy)
        assert np.isnan(y[..., 2]).all() and np.isfinite(y[..., [0, 1, 3, 4]]).all()
        for new, old, clean in zip(statistics(layer), before, statistics(twin), strict=True):
            assert new[2] == old[2]
            assert same_bits(np.delete(new, 2), np.delete(clean, 2))


def test_a_batch_of_nothing_changes_no_statistics() -> None:
    x, dy = np.zeros((0, 4, 5), np.float32), np.zeros((0, 4, 5), np.float32)
    for layer, step in ((keras_layer(), keras_step), (torch_layer(), torch_step)):
        run: Callable[..., list[np.ndarray]] = step
        before = statistics(layer)
        run(layer, x, dy)
        for a, b in zip(statistics(layer), before, strict=True):
            assert same_bits(a, b)


def test_recalibrate() -> None:
    """Afterwards the standard deviation belongs to the variance; what r and d use is left."""
    data = [normal(8, 4, 5, seed=i) * 3 + 1 for i in range(2)]
    model = keras.Sequential([keras.Input((4, 5)), keras_layer()])
    hvd_syncbn.keras.recalibrate(model, data, progress=False)
    twin = nn.Sequential(torch_layer())
    hvd_syncbn.torch.recalibrate(twin, [torch.from_numpy(np.moveaxis(x, -1, 1).copy()) for x in data], progress=False)
    for a, b in zip(statistics(model.layers[0]), statistics(twin[0]), strict=True):
        assert same_bits(a, b)
    _, variance, stddev, renorm_mean, renorm_stddev = statistics(twin[0])
    assert (variance > 4).all()
    np.testing.assert_allclose(stddev.astype(np.float64) ** 2 - 1e-3, variance, rtol=1e-6)
    assert (renorm_mean == 0).all() and (renorm_stddev == 1).all()
    before = statistics(twin[0])
    with pytest.raises(ValueError, match="channels"):
        hvd_syncbn.torch.recalibrate(twin, [torch.zeros(2, 6)], progress=False)
    for a, b in zip(statistics(twin[0]), before, strict=True):
        assert same_bits(a, b)


def test_frozen_uses_moving_statistics() -> None:
    x = normal(6, 4, 5)
    for layer, step, freeze in (
        (keras_layer(), keras_step, hvd_syncbn.keras.freeze_batchnorm),
        (torch_layer(), None, hvd_syncbn.torch.freeze_batchnorm),
    ):
        before = statistics(layer)
        freeze(layer)
        y = layer(x, training=True) if step else layer(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
        evaluated = layer(x) if step else layer.eval()(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
        np.testing.assert_allclose(*(np.asarray(t if step else t.detach()) for t in (y, evaluated)), rtol=1e-5, atol=1e-5)
        for a, b in zip(statistics(layer), before, strict=True):
            assert same_bits(a, b)


def test_exchange() -> None:
    layer = torch_layer()
    assert not hvd_syncbn.torch.get_state(layer).unbiased
    assert not hvd_syncbn.keras.get_state(keras_layer()).unbiased
    with pytest.raises(ValueError, match=r"does not contain the state of batch renormalization.*renorm=True"):
        hvd_syncbn.torch.set_state(layer, hvd_syncbn.torch.get_state(layer))


@pytest.mark.parametrize("options", [{"momentum": None}, {"zero_debias": True}])
def test_averages_that_do_not_fit(options: dict[str, Any]) -> None:
    for make in (lambda: SyncBatchNormalization(renorm=True, **options), lambda: SyncBatchNorm(3, renorm=True, **options)):
        with pytest.raises(ValueError, match=r"momentum\. Received:.*(momentum=None|zero_debias=True)"):
            make()


def test_other_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="unbiased_variance=True"):
        SyncBatchNormalization(renorm=True, unbiased_variance=True)
    with pytest.raises(ValueError, match="track_running_stats=False"):
        SyncBatchNorm(3, renorm=True, track_running_stats=False)
    with pytest.raises(ValueError, match=r"renorm_momentum to be between 0 and 1. Received: 1.5"):
        SyncBatchNorm(3, renorm=True, renorm_momentum=1.5)
    assert bounds_of(None) == (0.0, np.inf, np.inf)


def test_a_keras_without_batch_renormalization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(layers.BatchNormalization, "_renorm_correction_and_moments")
    with pytest.raises(ValueError, match=r"this version of Keras has no batch renormalization. Received: renorm=True with"):
        SyncBatchNormalization(renorm=True)
    SyncBatchNormalization()


@pytest.mark.parametrize("skip", [True, False])
def test_a_channel_that_is_not_finite(skip: bool) -> None:
    """It keeps its statistics, or they become NaN; the others go on. In both frameworks."""
    x = normal(3, 4, 5)
    x[0, 0, 2] = np.inf
    of_keras, of_torch = keras_layer(skip_nonfinite=skip), torch_layer(skip_nonfinite=skip)
    before = [np.array(getattr(of_keras, name)) for name in STATISTICS]
    of_keras(x, training=True)
    of_torch(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
    after = [np.array(getattr(of_keras, name)) for name in STATISTICS]
    in_torch = ("running_mean", "running_var", "running_stddev", "renorm_mean", "renorm_stddev")
    for name, old, new in zip(in_torch, before, after, strict=True):
        assert same_bits(of_torch.get_buffer(name).numpy(), new)
        assert (new[2] == old[2]) if skip else np.isnan(new[2])
        assert np.isfinite(np.delete(new, 2)).all() and (np.delete(new, 2) != np.delete(old, 2)).all()
