"""`recalibrate` in Keras on one rank: the same as test_torch_recalibrate.py, as far as Keras has it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytest.importorskip("horovod")

import horovod.tensorflow as hvd  # noqa: E402
import keras  # noqa: E402
from keras import layers  # noqa: E402

from hvd_syncbn import progress  # noqa: E402
from hvd_syncbn.keras import SyncBatchNormalization, freeze_batchnorm, recalibrate  # noqa: E402
from tests import recalibration  # noqa: E402
from tests.arrays import NUMPY, same_bits  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:the statistics of layer")


@pytest.fixture(scope="module", autouse=True)
def _horovod() -> None:
    hvd.init()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1, 3, shape).astype(np.float32)


def sequence(shape: tuple[int | None, ...], *norms: Any) -> keras.Sequential:
    return keras.Sequential([keras.Input(shape), *norms])


def statistics(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    return layer.moving_mean.numpy(), layer.moving_variance.numpy()


def direct(x: np.ndarray, axis: int = -1, unbiased: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of every channel, in float64."""
    rows = np.moveaxis(x.astype(np.float64), axis, -1).reshape(-1, x.shape[axis])
    return rows.mean(0), rows.var(0, ddof=int(unbiased))


def assert_close(got: Any, want: Any, rtol: float = 2e-7) -> None:
    """`direct` sums in another order, in float64; a float32 rounding may fall the other way."""
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.astype(np.float64), b, rtol=rtol, atol=1e-7)


def same(before: list[np.ndarray], after: list[np.ndarray]) -> bool:
    return all(same_bits(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("policy", ["float32", "float64", "mixed_float16", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("make", [SyncBatchNormalization, layers.BatchNormalization], ids=["ours", "theirs"])
def test_types(make: Any, policy: str) -> None:
    model = sequence((4, 5), make(dtype=policy))
    x = normal(20, 4, 5).astype(NUMPY[model.layers[0].compute_dtype])
    recalibrate(model, [x[:7], x[7:]], estimator="pooled")
    rtol = {"float64": 1e-14, "bfloat16": 2**-7}.get(policy, 2e-7)
    assert_close(statistics(model.layers[0]), direct(x), rtol)


def test_conventions() -> None:
    """The biased variance as Keras has it; the unbiased one where the layer asks for it; always in the paper's estimator."""
    x = normal(12, 3)
    plain, unbiased = sequence((3,), SyncBatchNormalization()), sequence((3,), SyncBatchNormalization(unbiased_variance=True))
    pooled = {"estimator": "pooled"}
    for model, options, ddof in ((plain, pooled, 0), (unbiased, pooled, 1), (plain, {}, 1)):
        recalibrate(model, [x], **options)
        assert_close(statistics(model.layers[0]), direct(x, unbiased=bool(ddof)))


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_axis_and_mask(axis: int) -> None:
    x = normal(6, 4, 5, 3)
    model = sequence((4, 5, 3), SyncBatchNormalization(axis=axis))
    recalibrate(model, [x[:2], x[2:]], estimator="pooled")
    assert_close(statistics(model.layers[0]), direct(x, axis))
    if axis == -1:
        masked = sequence((5, 3), layers.Masking(), SyncBatchNormalization(), layers.BatchNormalization())
        x = x[:, 0]
        x[:, 3:] = 0
        recalibrate(masked, [x], estimator="pooled")
        assert_close(statistics(masked.layers[1]), direct(x[:, :3]))


def test_layer_by_layer_is_what_inference_sees() -> None:
    keras.utils.set_random_seed(0)
    blocks = [
        m for _ in range(3) for m in (layers.Conv2D(4, 3, padding="same"), SyncBatchNormalization(epsilon=1e-12), layers.ReLU())
    ]
    model = sequence((6, 6, 4), *blocks)
    x = normal(30, 6, 6, 4) * 50
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        recalibrate(model, [x[:10], x[10:]], layer_by_layer=True)
    for layer in model.layers:
        x = layer(x)
        if isinstance(layer, SyncBatchNormalization):
            mean, variance = direct(x.numpy())
            np.testing.assert_allclose(mean, 0, atol=1e-5)
            np.testing.assert_allclose(variance, 1, atol=1e-4)


def test_one_pass_says_when_it_is_not_enough() -> None:
    model = sequence((4,), SyncBatchNormalization(name="first"), SyncBatchNormalization())
    with pytest.warns(UserWarning, match=r"layer 'first' moved by .* standard deviations.*layer_by_layer=True"):
        recalibrate(model, [normal(30, 4) * 50], estimator="pooled")


def test_wherever_the_layers_are() -> None:
    """Nested, shared, in a wrapper, in a model of a class, in a `tf.function`; two uses are one layer's."""

    class Written(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.norms = [SyncBatchNormalization(name="a"), layers.BatchNormalization(name="b")]

        @tf.function
        def twice(self, x: Any, training: bool) -> Any:
            return self.norms[0](self.norms[0](x, training=training) * 0 + 2 * x, training=training)

        def call(self, x: Any, training: bool = False) -> Any:
            return self.norms[1](self.twice(x, training), training=training)

    x = normal(9, 4)
    model = Written()
    model(x)  # traced, before
    recalibrate(model, [x], estimator="pooled")
    assert_close(statistics(model.norms[0]), direct(np.concatenate([x, 2 * x])))
    nested = sequence((4,), sequence((4,), SyncBatchNormalization()))
    recalibrate(nested, [x], estimator="pooled")
    assert_close(statistics(nested.layers[0].layers[0]), direct(x))
    assert not tf.config.functions_run_eagerly()


def test_init_affine_inserts_the_identity() -> None:
    keras.utils.set_random_seed(0)
    first, second = layers.Conv2D(8, 3, activation="relu"), layers.Conv2D(4, 3, padding="same")
    trained = sequence((4, 3, 5), first, second)
    x = np.moveaxis(recalibration.images(), 1, -1) * 7 + 3
    want = trained(x).numpy()
    inserted = sequence(
        (4, 3, 5),
        SyncBatchNormalization(),
        first,
        SyncBatchNormalization(activation="relu"),
        second,
        layers.BatchNormalization(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        recalibrate(inserted, [x[:9], x[9:]], init_affine=True)
    np.testing.assert_allclose(inserted(x), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    last = inserted.layers[-1]
    assert same_bits(last.beta.numpy(), last.moving_mean.numpy())
    np.testing.assert_allclose(last.gamma.numpy(), np.sqrt(last.moving_variance.numpy() + last.epsilon), rtol=1e-7)


@pytest.mark.parametrize("estimator", ["pooled", "batches"])
def test_nothing_else_changes(estimator: str) -> None:
    @keras.saving.register_keras_serializable("test")
    class Counter(layers.Layer):
        def build(self, shape: Any) -> None:
            self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x: Any) -> Any:
            self.count.assign_add(1)
            return x

    norm = SyncBatchNormalization()
    noise = layers.Dropout(0.5)
    inputs = keras.Input((6,))
    x = noise(Counter()(norm(layers.Dense(4)(inputs))), training=True)
    frozen = layers.BatchNormalization(trainable=False)
    model = keras.Model(inputs, frozen(layers.SpectralNormalization(layers.Dense(3))(x)))
    model.compile("adam", "mse")
    before = [(v, v.numpy().copy()) for v in model.variables]
    trainable = [layer.trainable for layer in model.layers]
    assert recalibrate(model, [normal(8, 6), normal(3, 6)], estimator=estimator) is model
    for variable, value in before:
        assert same_bits(variable.numpy(), value) is not any(variable is v for v in norm.non_trainable_variables)
    assert [layer.trainable for layer in model.layers] == trainable
    assert "call" not in vars(norm)


@pytest.mark.parametrize("options", [{}, {"estimator": "batches"}, {"init_affine": True}, {"layer_by_layer": True}], ids=str)
def test_an_exception_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    class Broken(RuntimeError):
        pass

    calls = []

    def forward(model: Any, x: Any) -> None:
        calls.append(model(x))
        if len(calls) == (5 if options.get("layer_by_layer") else 2):
            raise Broken

    model = sequence((4,), SyncBatchNormalization(), layers.BatchNormalization())
    before = model.get_weights()
    with pytest.raises(Broken):
        recalibrate(model, [normal(6, 4, seed=i) for i in range(3)], forward=forward, **options)
    assert same(before, model.get_weights()) and all("call" not in vars(layer) for layer in model.layers)
    assert not tf.config.functions_run_eagerly()


def test_unused_layers_and_other_classes() -> None:
    @keras.saving.register_keras_serializable("test")
    class Scaled(layers.BatchNormalization):
        def call(self, x: Any, **options: Any) -> Any:
            return super().call(4 * x, **options)

    model = sequence((4,), SyncBatchNormalization(name="used"), layers.BatchNormalization(name="unused"), Scaled(name="scaled"))
    before = [layer.get_weights() for layer in model.layers[1:]]
    with pytest.warns(UserWarning) as found:
        recalibrate(model, [normal(5, 4)], forward=lambda m, x: m.layers[0](x))
    texts = [str(warning.message) for warning in found]
    assert any("keep their statistics: ['unused']" in text for text in texts)
    assert any("'scaled' keeps its statistics" in text for text in texts)
    assert all(same(a, layer.get_weights()) for a, layer in zip(before, model.layers[1:], strict=True))


def test_kinds_of_batches() -> None:
    torch = pytest.importorskip("torch")
    x, y = normal(12, 4), np.arange(12)

    class Parts(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> Any:
            return x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]

    class Named(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm = SyncBatchNormalization(name="norm")
            self.norm.build((None, 4))

        def call(self, inputs: Any) -> Any:
            return self.norm(inputs["x"])

    def plain() -> keras.Model:
        return sequence((4,), SyncBatchNormalization(name="norm"))

    def two_inputs() -> keras.Model:
        a, b = keras.Input((4,)), keras.Input((1,))
        norm = SyncBatchNormalization(name="norm")
        return keras.Model([a, b], [norm(a), b])

    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(5)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=5)

    def stream() -> Iterator[Any]:
        yield from (x[i : i + 1] for i in range(12))

    want = None
    for model, data in (
        (plain(), [x]),
        (plain(), [x[:5], x[5:].astype(np.float64)]),
        (plain(), [(x[:5], y[:5]), (x[5:], y[5:], y[5:])]),
        (plain(), [[x[:5], y[:5]], [x[5:], y[5:]]]),
        (plain(), stream()),
        (plain(), dataset),
        (plain(), dataset.map(lambda x, y: x)),
        (plain(), Parts()),
        (plain(), loader),
        (plain(), [x[:0], x]),
        (Named(), [{"x": x[:5]}, {"x": x[5:]}]),
        (Named(), [({"x": x}, y)]),
        (two_inputs(), [([x, y.astype(np.float32)[:, None]], y)]),
        (two_inputs(), [[x, y.astype(np.float32)[:, None]]]),
    ):
        recalibrate(model, data, estimator="pooled")
        (norm,) = (layer for layer in model.layers if layer.name == "norm")
        found = list(statistics(norm))
        assert same(want or found, found), type(data)
        want = found
    assert_close(want, direct(x))


def test_a_bar_for_long_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.02)

    def forward(model: Any, x: Any) -> None:
        time.sleep(0.03)
        model(x)

    model = sequence((4,), SyncBatchNormalization())
    for shown in (True, False):
        recalibrate(model, tf.data.Dataset.from_tensor_slices(normal(12, 4)).batch(3), forward=forward, progress=shown)
        assert ("4/4" in capsys.readouterr().err) is shown


def norm(shape: tuple[int | None, ...] = (4,), **options: Any) -> keras.Model:
    return sequence(shape, SyncBatchNormalization(name="norm", **options))


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        ("resnet", [], {}, TypeError, r"expected a Keras 3 model or layer. Received: builtins.str"),
        (lambda: layers.Dense(2), [], {}, ValueError, r"no batch normalization layer.*Received: Dense"),
        (lambda: freeze_batchnorm(norm(), affine=True), [], {}, ValueError, r"Received: frozen layers \['norm'\]"),
        (lambda: norm(trainable=False), [], {}, ValueError, r"Received: frozen layers \['norm'\]"),
        (lambda: keras.Sequential([SyncBatchNormalization()]), [], {}, ValueError, r"the model is not built.*Received"),
        (norm, [], {}, ValueError, r"no rank has a batch.*Received: batches without"),
        (norm, normal(3, 4), {}, TypeError, r"expected batches to be.*\[batch\]. Received: ndarray"),
        (norm, tf.zeros((3, 4)), {}, TypeError, r"expected batches to be.*Received: .*Tensor"),
        (norm, {"x": 1}, {}, TypeError, r"expected batches to be.*Received: dict"),
        (norm, ["text"], {}, TypeError, r"pass `forward`. Received: str"),
        (norm, tf.data.Dataset.from_tensors(normal(3, 4)).repeat(), {}, ValueError, r"an infinite tf.data.Dataset"),
        (norm, [normal(3, 5)], {}, ValueError, r"incompatible with the layer"),
        (norm, [normal(1, 4)], {"estimator": "pooled"}, ValueError, r"1 value per channel in the data.*'norm'"),
        (norm, [normal(1, 4)] * 2, {}, ValueError, r"in a global batch.*drop_last"),
        (norm, [normal(3, 4)], {"estimator": "mean"}, ValueError, r"\('pooled', 'batches'\). Received: 'mean'"),
        (norm, [normal(3, 4)], {"forward": 3}, TypeError, r"expected forward to be a function.*Received: int"),
        (lambda: norm(scale=False), [], {"init_affine": True}, ValueError, r"gamma and beta. Received: layer 'norm'"),
        (norm, iter([normal(3, 4)]), {"layer_by_layer": True}, ValueError, r"can be read only once"),
        (norm, [], {"layer_by_layer": True, "init_affine": True}, ValueError, r"init_affine=True"),
        (norm, [1], {"forward": lambda m, b: None}, ValueError, r"Check that `forward` runs this model"),
    ],
)
def test_wrong_calls(model: Any, data: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = model() if callable(model) else model
    before = model.get_weights() if isinstance(model, layers.Layer) else []
    with pytest.raises(error, match=message):
        recalibrate(model, data, **options)
    assert not before or same(before, model.get_weights())


def test_a_layer_in_a_graph_is_refused() -> None:
    model = norm()
    with pytest.raises(RuntimeError, match="runs in a graph"):
        recalibrate(model, [1], forward=lambda m, _: list(tf.data.Dataset.from_tensors(normal(3, 4)).map(m)))
