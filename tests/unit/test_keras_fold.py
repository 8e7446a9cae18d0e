"""fold_batchnorm in Keras: what becomes a part of what, what is refused and why, and that outputs are equal.

Tolerance: a folded weight is rounded once (2^-24 of it), and the convolution adds other products than before. The sums here
have up to 100 terms of about 1, so float32 outputs differ by some 1e-6 of their size, float64 ones by 1e-15.
"""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from hvd_syncbn import progress
from hvd_syncbn.keras import Scale, SyncBatchNormalization, convert_sync_batchnorm, fold_batchnorm
from tests.arrays import same_bits

TOLERANCE = {"float32": 2e-5, "float64": 1e-13}


@pytest.fixture(autouse=True)
def _fresh_names() -> None:
    keras.utils.clear_session(free_memory=False)
    keras.config.set_dtype_policy("float32")


def randomize(model: keras.Model) -> keras.Model:
    """Weights and statistics that are not 0 or 1."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        values = rng.standard_normal(weight.shape)
        weight.assign(np.abs(values) + 0.5 if "variance" in weight.path else values)
    return model


def data(model: keras.Model, seed: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    inputs = [rng.standard_normal([2, *tensor.shape[1:]]).astype(tensor.dtype) for tensor in model.inputs]
    return inputs[0] if len(inputs) == 1 else inputs


def evaluate(model: keras.Model, x: Any) -> Any:
    try:
        return np.asarray(model(x, training=False))
    except tf.errors.OpError:  # XLA's convolutions take every layout on a CPU
        run = tf.function(lambda x: model(x, training=False), jit_compile=True, autograph=False)
        return np.asarray(run(tf.constant(x)))


def count(model: keras.Model, cls: type) -> int:
    return sum(isinstance(layer, cls) for layer in model._flatten_layers())


def assert_equal(folded: keras.Model, model: keras.Model) -> None:
    x = data(model)
    got, want = evaluate(folded, x), evaluate(model, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[want.dtype.name] * np.abs(want).max())


def folds(model: keras.Model, left: int = 0) -> keras.Model:
    """The folded model, which answers as before; the original does not change, and there is no warning."""
    randomize(model)
    before = model.get_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        folded = fold_batchnorm(model)
    assert count(folded, layers.BatchNormalization) == left
    assert_equal(folded, model)
    assert all(same_bits(a, b) for a, b in zip(model.get_weights(), before, strict=True))
    assert not {id(w) for w in model.weights} & {id(w) for w in folded.weights}
    assert folded.name == model.name
    return folded


def refuses(model: keras.Model, reason: str, name: str = ".*") -> keras.Model:
    randomize(model)
    with pytest.warns(UserWarning, match=rf"'{name}' is not folded: .*{reason}"):
        folded = fold_batchnorm(model)
    assert_equal(folded, model)
    return folded


def sequence(shape: tuple[int, ...], *parts: Any) -> keras.Model:
    return keras.Sequential([keras.Input(shape), *parts])


def functional(shape: tuple[int, ...], *parts: Any) -> keras.Model:
    inputs = x = keras.Input(shape)
    for part in parts:
        x = part(x)
    return keras.Model(inputs, x)


MODELS = (sequence, functional)

# --- Kinds of layers --------------------------------------------------------------------------------------------------

SPATIAL = {1: (9,), 2: (9, 7), 3: (5, 6, 7)}
CONV = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}
TRANSPOSED = {1: layers.Conv1DTranspose, 2: layers.Conv2DTranspose, 3: layers.Conv3DTranspose}
DEPTHWISE = {1: layers.DepthwiseConv1D, 2: layers.DepthwiseConv2D}
SEPARABLE = {1: layers.SeparableConv1D, 2: layers.SeparableConv2D}


def shape(dims: int, data_format: str) -> tuple[int, ...]:
    return (*SPATIAL[dims], 6) if data_format == "channels_last" else (6, *SPATIAL[dims])


def norm(data_format: str = "channels_last", cls: Any = layers.BatchNormalization, **options: Any) -> Any:
    return cls(axis=-1 if data_format == "channels_last" else 1, **options)


KINDS = [
    *((CONV[d], d, (12, 3), {}) for d in CONV),
    *((CONV[d], d, (12, 3), {"groups": 2, "use_bias": False, "dilation_rate": 2}) for d in (1, 2)),
    (layers.Conv1D, 1, (12, 3), {"padding": "causal"}),
    *((TRANSPOSED[d], d, (4, 3), {"strides": 2, "use_bias": d == 2}) for d in TRANSPOSED),
    *((DEPTHWISE[d], d, (3,), {"depth_multiplier": 2, "use_bias": d == 1}) for d in DEPTHWISE),
    # Not 5 filters: where the last axis has as many values, Keras 3.15 adds a bias along it, channels first or not.
    *((SEPARABLE[d], d, (8, 3), {"depth_multiplier": 2, "use_bias": d == 1}) for d in SEPARABLE),
]


# Channels first as far as Keras has them, and not in 3-D, which XLA takes seconds for.
CASES = [
    (*kind, data_format)
    for data_format in ("channels_last", "channels_first")
    for kind in KINDS
    if data_format == "channels_last" or (kind[1] < 3 and "padding" not in kind[3])
]


def name(case: Any) -> str:
    return f"{case[0].__name__}-{case[3]}-{case[4]}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_layer_then_norm(case: Any) -> None:
    cls, dims, arguments, options, data_format = case
    folded = folds(
        sequence(
            shape(dims, data_format),
            cls(*arguments, data_format=data_format, **{"padding": "same"} | options),
            norm(data_format, center=dims != 2),
        )
    )
    assert type(folded.layers[0]) is cls and folded.layers[0].use_bias and len(folded.layers) == 1


@pytest.mark.parametrize("case", [c for c in CASES if c[0] not in TRANSPOSED.values() and "padding" not in c[3]], ids=name)
def test_norm_then_layer(case: Any) -> None:
    cls, dims, arguments, options, data_format = case
    layer = cls(*arguments, data_format=data_format, **options)
    folded = folds(functional(shape(dims, data_format), norm(data_format), layer))
    assert len(folded.layers) == 2


def test_dense_takes_the_last_axis_of_any_input() -> None:
    for before in ((), (7,), (3, 7)):
        folds(sequence((*before, 5), layers.Dense(6, use_bias=False), norm(), layers.Dense(4), layers.ReLU()))
        folds(sequence((*before, 5), norm(), layers.Dense(6)))


def test_float64() -> None:
    keras.config.set_dtype_policy("float64")
    folds(sequence((9, 9, 6), layers.Conv2D(4, 3), norm(), layers.ReLU(), layers.Conv2D(5, 1), norm()))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [True, False])
def test_fused_activation_and_residual(residual: bool, activation: str | None) -> None:
    inputs = keras.Input((8, 8, 6))
    layer = norm(cls=SyncBatchNormalization, activation=activation)
    x = layers.Conv2D(6, 3, padding="same")(inputs)
    folded = folds(keras.Model(inputs, layer(x, residual=inputs) if residual else layer(x)))
    assert count(folded, layers.Add) == residual and count(folded, layers.ReLU) == (activation is not None)
    alone = folds(keras.Model(inputs, layer(layers.MaxPooling2D(1)(inputs), residual=inputs) if residual else layer(inputs)))
    assert count(alone, Scale) == 1
    if not residual:
        assert count(folds(sequence((8, 8, 6), norm(cls=SyncBatchNormalization, activation=activation))), Scale) == 1


@pytest.mark.parametrize("make", MODELS)
def test_scale(make: Any) -> None:
    """Caffe's chain, conv + norm + Scale, and norm + Scale, and two norms."""
    plain = {"center": False, "scale": False}
    chain = folds(make((8, 8, 6), layers.Conv2D(4, 3, use_bias=False), norm(**plain), Scale(), layers.ReLU()))
    assert count(chain, Scale) == 0
    pair = folds(make((8, 8, 6), norm(**plain), Scale(center=False)))
    assert count(pair, Scale) == 1 and len(pair.weights) == 2
    twice = folds(make((8, 8, 6), norm(), norm(cls=SyncBatchNormalization, activation="relu")))
    assert count(twice, Scale) == 1
    with pytest.warns(UserWarning, match=r"found no batch normalization to fold. Received: model "):
        again = fold_batchnorm(pair)
    assert_equal(again, pair)
    layer = Scale.from_config(Scale(axis=1, center=False, name="scale").get_config())
    assert (layer.axis, layer.center, layer.name) == (1, False, "scale")


# --- Models -----------------------------------------------------------------------------------------------------------


def block(x: Any, filters: int = 6) -> Any:
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)))
    y = layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same")(y))
    short = layers.BatchNormalization()(layers.Conv2D(filters, 1)(x))
    return keras.ops.relu(y + short)


def network() -> keras.Model:
    """Functional and Sequential models inside, operations, two inputs, two outputs' worth of branches."""
    inputs = [keras.Input((9, 9, 3), name="image"), keras.Input((6,), name="extra")]
    stem = keras.Sequential([layers.Conv2D(6, 3), layers.BatchNormalization(), layers.ReLU()], name="stem")
    inner_input = keras.Input((7, 7, 6))
    inner = keras.Model(inner_input, block(inner_input), name="inner")
    x = inner(inner(stem(inputs[0])))
    x = layers.ReLU()(layers.BatchNormalization(name="pre")(x))
    x = layers.Conv2D(6, 3, padding="same")(x)
    x = layers.GlobalAveragePooling2D()(layers.Dropout(0.5)(x)) * inputs[1]
    return keras.Model(inputs, layers.BatchNormalization()(layers.Dense(5)(x)), name="network")


@pytest.mark.parametrize("converted", [False, True])
def test_a_network(converted: bool) -> None:
    model = network()
    folded = folds(convert_sync_batchnorm(model) if converted else model)
    assert count(folded, Scale) == 1 and isinstance(folded.get_layer("pre"), Scale)
    assert [tensor.name for tensor in folded.inputs] == ["image", "extra"]


def test_dictionaries_of_inputs_and_outputs() -> None:
    inputs = {"a": keras.Input((5,), name="a"), "b": keras.Input((5,), name="b")}
    x = layers.BatchNormalization()(layers.Dense(6)(inputs["a"] + inputs["b"]))
    model = randomize(keras.Model(inputs, {"y": x, "z": keras.ops.relu(x)}))
    batch = dict(zip("ab", data(model), strict=True))
    got, want = fold_batchnorm(model)(batch), model(batch)
    for name in ("y", "z"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)


def test_trainable_and_saving(tmp_path: Any) -> None:
    """What is frozen stays so, and the file needs no more than Keras and, for a Scale, this package."""
    model = randomize(sequence((8, 8, 3), norm(), layers.ReLU(), layers.Conv2D(4, 3), norm(), layers.Dense(2)))
    model.compile("sgd", "mse")
    for layer in model.layers[:4]:
        layer.trainable = False
    folded = fold_batchnorm(model)
    assert not folded.compiled and len(folded.trainable_weights) == 2 and len(folded.weights) == 6
    folded.save(tmp_path / "model.keras")
    x = data(model)
    assert same_bits(keras.models.load_model(tmp_path / "model.keras")(x), folded(x))
    # For training, too: the frozen part answers in training as the model does, and the rest learns.
    folded.compile("sgd", "mse")
    before = folded.get_weights()
    np.testing.assert_allclose(folded(x, training=True), model(x, training=True), atol=1e-4)
    folded.fit(x, np.zeros((2, 6, 6, 2)), verbose=0)
    assert [same_bits(a, b) for a, b in zip(folded.get_weights(), before, strict=True)] == [True] * 4 + [False] * 2


def test_mixed_precision() -> None:
    """float32 weights, float16 outputs: two roundings of those, 1e-3, and the convolution's own."""
    keras.config.set_dtype_policy("mixed_float16")
    model = randomize(sequence((6, 6, 3), layers.Conv2D(4, 3), norm(cls=SyncBatchNormalization, activation="relu")))
    folded = fold_batchnorm(model)
    assert folded.layers[0].compute_dtype == "float16" and folded.layers[0].kernel.dtype == "float32"
    got, want = (np.asarray(m(data(model)), np.float32) for m in (folded, model))
    np.testing.assert_allclose(got, want, atol=5e-3 * np.abs(want).max())


# --- Refusals ---------------------------------------------------------------------------------------------------------


class MyConv(layers.Conv2D):
    def call(self, x: Any) -> Any:
        return 2 * super().call(x)


class MyNorm(layers.BatchNormalization):
    def call(self, x: Any, training: bool | None = None, mask: Any = None) -> Any:
        return 2 * super().call(x, training=training, mask=mask)


def shared_layer() -> keras.Model:
    inputs, conv = keras.Input((6, 6, 4)), layers.Conv2D(4, 3, name="conv")
    x = layers.BatchNormalization(name="norm")(conv(inputs)) + layers.BatchNormalization(name="b")(conv(inputs + 1))
    return keras.Model(inputs, x)


def shared_norm() -> keras.Model:
    inputs, shared = keras.Input((6, 6, 4)), layers.BatchNormalization(name="norm")
    return keras.Model(inputs, shared(layers.Conv2D(4, 3)(inputs)) + shared(layers.Conv2D(4, 3)(inputs)))


def tapped() -> keras.Model:
    inputs = keras.Input((6, 6, 4))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    return keras.Model(inputs, layers.BatchNormalization(name="norm")(x) + keras.ops.exp(x))


def own_residual() -> keras.Model:
    inputs = keras.Input((6, 6, 4))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    return keras.Model(inputs, SyncBatchNormalization(name="norm")(x, residual=x))


def one_after_the_other(*parts: Any, axis: int = -1) -> Any:
    return lambda make: make((6, 6, 4), *(part() for part in parts))


def named(**options: Any) -> Any:
    return lambda: layers.BatchNormalization(name="norm", **options)


def conv(**options: Any) -> Any:
    return lambda: layers.Conv2D(4, 3, name="conv", **options)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (one_after_the_other(conv(), layers.ReLU, named()), "between 'conv' and it there are other layers: 're_lu'"),
        (
            one_after_the_other(conv(), layers.ReLU, layers.MaxPooling2D, named()),
            "between 'conv' and it there are other layers: 're_lu', 'max_pooling2d'",
        ),
        (one_after_the_other(conv(activation="relu"), named()), "the activation of 'conv' is between them"),
        (one_after_the_other(named(), conv(padding="same")), "'conv' after it pads with zeros"),
        (one_after_the_other(named(), lambda: layers.Conv2DTranspose(4, 3, name="conv")), "'conv', a transposed convolution"),
        (one_after_the_other(conv(), named(axis=1)), "it normalizes axis 1, and the channels of 'conv' are axis 3"),
        (one_after_the_other(lambda: MyConv(4, 3, name="conv"), named()), "'conv' is a MyConv, which may do more"),
        (one_after_the_other(conv(), lambda: MyNorm(name="norm")), "a MyNorm may do more"),
        (
            one_after_the_other(lambda: layers.Dense(4, name="dense", lora_rank=2), named()),
            "'dense' is quantized or has LoRA",
        ),
        (
            one_after_the_other(lambda: layers.TimeDistributed(layers.BatchNormalization(name="norm"), name="steps")),
            "in a layer for which the order of calls is not known",
        ),
    ],
)  # fmt: skip
def test_refusals(make: Any, model: Any, reason: str) -> None:
    folded = refuses(model(make), reason, name=r"[\w.]*(norm|steps.layer)")
    assert count(folded, layers.BatchNormalization) == 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (shared_layer, "'conv' is shared"),
        (shared_norm, "it is shared"),
        (tapped, "the output of 'conv' is used elsewhere, too"),
        (own_residual, "the output of 'conv' is used elsewhere, too"),
    ],
)
def test_refusals_of_graphs(make: Any, reason: str) -> None:
    refuses(make(), reason, name="norm")


def test_the_end_of_a_model_inside_is_an_end() -> None:
    """A convolution in one model and its norm in another: the inner one may be called by others."""
    inner = keras.Sequential([keras.Input((6, 6, 4)), layers.Conv2D(4, 3)])
    folded = folds(sequence((6, 6, 4), inner, norm(name="norm")))
    assert count(folded, Scale) == 1


def test_a_refused_norm_that_holds_another() -> None:
    folded = folds(sequence((6, 6, 4), norm(), norm(), layers.Conv2D(4, 3, padding="same")))
    assert count(folded, Scale) == 1


def test_weights_too_large_for_float16() -> None:
    keras.config.set_dtype_policy("float16")
    model = sequence((3, 3, 4), layers.Conv2D(4, 1, kernel_initializer="ones"), norm(name="norm"))
    model.layers[1].gamma.assign(np.full(4, 60000.0))
    model.layers[1].moving_variance.assign(np.full(4, 0.001))
    with pytest.warns(UserWarning, match="'norm' is not folded: the weights of 'conv2d' would be too large for float16"):
        assert count(fold_batchnorm(model), layers.BatchNormalization) == 1


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.norm = layers.BatchNormalization()

    def call(self, x: Any) -> Any:
        return self.norm(x)


class OwnCall(keras.Sequential):
    def call(self, x: Any, training: bool | None = None, mask: Any = None) -> Any:
        return 2 * super().call(x, training=training, mask=mask)


def test_wrong_calls() -> None:
    for wrong, received in ((None, "NoneType"), (layers.BatchNormalization(), "BatchNormalization"), (keras.Model, "type")):
        with pytest.raises(TypeError, match=rf"Expected a keras.Model. Received: {received} of "):
            fold_batchnorm(wrong)
    for model in (
        Subclassed(),
        OwnCall([keras.Input((3,)), layers.Dense(3), norm()]),
        keras.Sequential([layers.Dense(3), norm()]),
    ):
        with pytest.raises(
            ValueError, match=rf"functional and Sequential models only. Received: {type(model).__name__}, built="
        ):
            fold_batchnorm(model)
    with pytest.warns(UserWarning, match=r"found no batch normalization to fold"):
        fold_batchnorm(sequence((3,), layers.Dense(3)))


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("variable", progress.RANK_VARIABLES)
def test_progress(variable: str, rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar where it takes long, on the first rank."""
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setenv(variable, rank)
    fold_batchnorm(randomize(network()))
    assert ("Folding batch norms" in capsys.readouterr().err) == (rank == "0")
