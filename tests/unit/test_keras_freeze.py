"""freeze_batchnorm in Keras: what a frozen layer computes, what freezing survives, and that unfreezing gives all back."""

from __future__ import annotations

import warnings
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras import layers

from hvd_syncbn.keras import (
    SyncBatchNormalization,
    convert_sync_batchnorm,
    fold_batchnorm,
    freeze_batchnorm,
    get_state,
    revert_sync_batchnorm,
    unfreeze_batchnorm,
)
from hvd_syncbn.torch import SyncBatchNorm, set_state
from hvd_syncbn.torch import freeze_batchnorm as freeze_torch
from tests.arrays import NUMPY, same_bits
from tests.torch_tools import step as torch_step
from tests.torch_tools import to_numpy, to_torch


@pytest.fixture(autouse=True, scope="module")
def _horovod() -> None:
    hvd.init()


@pytest.fixture(autouse=True)
def _fresh_names() -> None:
    keras.utils.clear_session(free_memory=False)


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def randomize(layer: Any) -> Any:
    for i, weight in enumerate(layer.weights):
        values = normal(*weight.shape, seed=100 + i)
        weight.assign(values**2 + 0.5 if "variance" in weight.path else values)
    return layer


def made(shape: tuple[int, ...], **options: Any) -> SyncBatchNormalization:
    layer = SyncBatchNormalization(epsilon=1e-5, **options)
    layer.build(shape)
    return randomize(layer)


def step(layer: Any, x: Any, dy: Any, residual: Any, graph: bool = False) -> dict[str, Any]:
    def run(x: Any, dy: Any, residual: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, residual])
            y = layer(x, training=True, residual=residual)
        sources = {"dx": x, "dresidual": residual} | {"d" + v.name: v.value for v in (layer.gamma, layer.beta)}
        return {"y": y, **tape.gradient(y, sources, output_gradients=dy)}

    run = tf.function(run, autograph=False) if graph else run
    return {name: t for name, t in run(*map(tf.constant, (x, dy, residual))).items() if t is not None}


# --- What a frozen layer computes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("dtype", "axis"),
    [("float32", -1), ("float32", 1), ("float32", 2), ("float64", 1), ("float16", 1), ("float16", -1), ("bfloat16", -1)],
)
def test_bytes_are_those_of_pytorch(dtype: str, affine: bool, activation: str | None, axis: int) -> None:
    """Outputs and all gradients, eager and in a graph. Those of PyTorch are the reference's (test_torch_freeze.py)."""
    shape = (3, 5, 4, 6)
    x, dy, residual = (normal(*shape, seed=i).astype(NUMPY[dtype]) for i in range(3))
    policy = dtype if dtype in ("float32", "float64") else f"mixed_{dtype}"
    layer = freeze_batchnorm(made(shape, axis=axis, activation=activation, dtype=policy), affine)
    before = layer.get_weights()
    other = SyncBatchNorm(shape[axis], eps=1e-5, activation=activation, dtype=torch.float64 if dtype == "float64" else None)
    set_state(other, get_state(layer))
    freeze_torch(other.train(), affine)
    first = [to_torch(np.moveaxis(v, axis, 1).astype(np.float64), dtype) for v in (x, dy, residual)]
    want = torch_step(other, *first)
    names = {"y": "y", "dx": "dx", "dresidual": "dresidual"} | ({"dgamma": "dweight", "dbeta": "dbias"} if affine else {})
    for graph in (False, True):
        got = step(layer, x, dy, residual, graph)
        assert got.keys() == names.keys()
        for name, theirs in names.items():
            value = to_numpy(want[theirs])
            assert same_bits(got[name], np.moveaxis(value, 1, axis) if value.ndim > 1 else value), (graph, name)
    assert all(same_bits(a, b) for a, b in zip(layer.get_weights(), before, strict=True))


@pytest.mark.parametrize("options", [{"scale": False}, {"center": False}], ids=str)
def test_close_to_keras_evaluation(options: dict[str, Any]) -> None:
    """float64, in Keras's own operations and by TensorFlow's gradients of them; sums over 100 values round at 1e-14."""
    layer = freeze_batchnorm(made((6, 4, 3), dtype="float64", **options), affine=True)
    x, dy = normal(6, 4, 3).astype(np.float64), normal(6, 4, 3, seed=1).astype(np.float64)
    results = []
    for training in (True, False):
        with tf.GradientTape() as tape:
            inputs = tf.constant(x)
            tape.watch(inputs)
            y = layer(inputs, training=training)
        variables = [v.value for v in layer.trainable_variables]
        assert len(variables) == 1
        results.append([y, *tape.gradient(y, [inputs, *variables], output_gradients=tf.constant(dy))])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


def test_evaluation_stays_keras_own() -> None:
    layer, x = made((4, 5, 3), activation="relu"), normal(4, 5, 3)
    want = layer(x, training=False)
    assert same_bits(freeze_batchnorm(layer)(x, training=False), want)


def test_empty_and_single_values() -> None:
    """No statistics are taken, so none are missing."""
    layer = freeze_batchnorm(made((None, 3)))
    assert layer(np.ones((0, 3), np.float32), training=True).shape == (0, 3)
    assert layer(np.ones((1, 3), np.float32), training=True).shape == (1, 3)


def test_bad_input() -> None:
    layer = freeze_batchnorm(made((None, 4, 3)))
    with pytest.raises(ValueError, match=r"residual.shape=\(4, 3\)"):
        layer(normal(2, 4, 3), residual=normal(4, 3), training=True)
    with pytest.raises(ValueError, match="expected axis -1"):
        layer(normal(2, 4, 5), training=True)


# --- What freezing survives -------------------------------------------------------------------------------------------


def model() -> keras.Model:
    inner = keras.Sequential([layers.Dense(4), layers.BatchNormalization()], name="inner")
    inputs = keras.Input((5,))
    x = layers.BatchNormalization(name="plain")(inner(inputs))
    x = SyncBatchNormalization(name="ours", activation="relu")(x, residual=x)
    return randomize(keras.Model(inputs, layers.Dense(2)(x)))


def norms(model: keras.Model) -> list[Any]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]


def assert_frozen(model: keras.Model, affine: bool = False) -> None:
    model.trainable = False
    model.trainable = True
    names = {v.name for v in model.trainable_variables}
    assert names == {"kernel", "bias", *(("gamma", "beta") if affine else ())}
    assert len(norms(model)) == 3
    x = normal(8, 5)
    statistics = [w.numpy() for layer in norms(model) for w in (layer.moving_mean, layer.moving_variance)]
    gamma = norms(model)[0].gamma.numpy()
    # Of this project's kernel and of Keras's operations: a few float32 roundings of values of about 10.
    np.testing.assert_allclose(model(x, training=True), model(x, training=False), rtol=1e-4, atol=1e-4)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(x, np.zeros((8, 2)), batch_size=4, epochs=2, verbose=0)
    after = [w.numpy() for layer in norms(model) for w in (layer.moving_mean, layer.moving_variance)]
    assert all(same_bits(a, b) for a, b in zip(after, statistics, strict=True))
    assert same_bits(norms(model)[0].gamma.numpy(), gamma) != affine


def saved_and_loaded(model: keras.Model, tmp_path: Any) -> keras.Model:
    model.save(tmp_path / "model.keras")
    return keras.models.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda m, _: m,
        saved_and_loaded,
        lambda m, _: convert_sync_batchnorm(m),
        lambda m, folder: saved_and_loaded(convert_sync_batchnorm(m), folder),
        lambda m, _: keras.models.clone_model(m, recursive=True),
        lambda m, _: freeze_batchnorm(m, norms(m)[0].frozen == "statistics"),
    ],
    ids=["nothing", "saved", "converted", "converted-saved", "cloned", "twice"],
)
def test_survives(change: Any, affine: bool, tmp_path: Any) -> None:
    frozen = freeze_batchnorm(model(), affine)
    changed = change(frozen, tmp_path)
    assert_frozen(changed, affine)
    unfreeze_batchnorm(changed)
    assert len(changed.trainable_variables) == 10
    mean = norms(changed)[0].moving_mean.numpy()
    changed(normal(8, 5), training=True)
    assert not same_bits(norms(changed)[0].moving_mean.numpy(), mean)


def test_converting_and_reverting() -> None:
    parts = [
        layers.Dense(4),
        layers.BatchNormalization(),
        SyncBatchNormalization(),
        layers.BatchNormalization(),
        layers.Dense(2),
    ]
    network = freeze_batchnorm(randomize(keras.Sequential([keras.Input((5,)), *parts])))
    revert_sync_batchnorm(convert_sync_batchnorm(network))
    assert not any(isinstance(layer, SyncBatchNormalization) for layer in norms(network))
    assert_frozen(network)
    unfreeze_batchnorm(network)
    assert {type(layer) for layer in norms(network)} == {layers.BatchNormalization}


def test_a_compiled_model_traces_anew() -> None:
    network = model()
    network.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    x, y = normal(8, 5), np.zeros((8, 2))
    network.fit(x, y, verbose=0)
    freeze_batchnorm(network)
    before = [w.numpy() for layer in norms(network) for w in layer.weights]
    network.fit(x, y, verbose=0)
    assert all(same_bits(a, w.numpy()) for a, w in zip(before, [w for n in norms(network) for w in n.weights], strict=True))
    unfreeze_batchnorm(network)
    network.fit(x, y, verbose=0)
    after = [w.numpy() for layer in norms(network) for w in layer.weights]
    assert not any(same_bits(a, b) for i, (a, b) in enumerate(zip(before, after, strict=True)) if i % 4 > 1)  # statistics


def test_unfreezing_gives_back_what_was_there() -> None:
    network = model()
    network.get_layer("plain").trainable = False
    network.get_layer("ours").beta.trainable = False
    configs = [layer.get_config() for layer in norms(network)]
    names = [sorted(vars(layer)) for layer in norms(network)]
    want = [v.path for v in network.trainable_variables]
    types = [type(layer) for layer in norms(network)]
    freeze_batchnorm(network)
    assert len(network.trainable_variables) == 4
    unfreeze_batchnorm(unfreeze_batchnorm(network))
    assert [v.path for v in network.trainable_variables] == want
    assert [type(layer) for layer in norms(network)] == types
    assert [layer.get_config() for layer in norms(network)] == configs
    assert [sorted(vars(layer)) for layer in norms(network)] == names


def test_layers_that_are_not_built() -> None:
    layer = freeze_batchnorm(SyncBatchNormalization())
    layer(normal(4, 3), training=True)
    assert not layer.trainable_variables and not layer.moving_mean.numpy().any()
    assert len(unfreeze_batchnorm(layer).trainable_variables) == 2


def test_frozen_layers_fold() -> None:
    inputs = keras.Input((6, 6, 3))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3)(inputs))
    network = freeze_batchnorm(randomize(keras.Model(inputs, SyncBatchNormalization()(layers.Conv2D(2, 3)(x)))))
    folded = fold_batchnorm(network)
    assert not norms(folded)
    x = normal(2, 6, 6, 3)
    want = network(x, training=True)
    np.testing.assert_allclose(folded(x, training=True), want, rtol=0, atol=2e-5 * np.abs(want).max())


# --- Wrong calls ------------------------------------------------------------------------------------------------------


class Derived(layers.BatchNormalization):
    pass


def test_wrong_calls() -> None:
    for call in (freeze_batchnorm, unfreeze_batchnorm):
        with pytest.raises(TypeError, match=r"must be a single Keras 3 model or layer.*builtins.dict"):
            call({})
        with pytest.warns(UserWarning, match=r"found no batch normalization\..*Received: 'dense"):
            call(layers.Dense(2))
    with pytest.raises(TypeError, match="affine='yes'"):
        freeze_batchnorm(model(), "yes")
    with pytest.warns(UserWarning, match="layer 'derived' is left unchanged: .* Received: an instance of Derived"):
        freeze_batchnorm(Derived(name="derived"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        freeze_batchnorm(model())
