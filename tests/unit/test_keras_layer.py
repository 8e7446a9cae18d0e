"""``SyncBatchNormalization`` on one rank: what Keras promises of its layer, and what ours adds."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

tf = pytest.importorskip("tensorflow")
pytest.importorskip("horovod")

import horovod.tensorflow as hvd  # noqa: E402
import keras  # noqa: E402
from keras import layers  # noqa: E402

from hvd_syncbn.keras import SyncBatchNormalization, convert_sync_batchnorm, revert_sync_batchnorm  # noqa: E402
from hvd_syncbn.tf_impl.keras.layer import warn_if_older  # noqa: E402
from tests.arrays import same_bits  # noqa: E402
from tests.needs import need  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _horovod() -> None:
    hvd.init()


@pytest.fixture(autouse=True)
def _fresh_names() -> None:
    keras.utils.clear_session(free_memory=False)


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(5.0, 10.0, shape).astype(np.float32)


def pair(**options: Any) -> tuple[SyncBatchNormalization, layers.BatchNormalization]:
    """Our layer and Keras's."""
    return SyncBatchNormalization(**options), layers.BatchNormalization(**options)


# ---- As Keras's layer


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 4, 3)], ids=str)
def test_weights_losses_and_shapes(center: bool, scale: bool, shape: tuple[int, ...]) -> None:
    options = {"center": center, "scale": scale, "beta_regularizer": "l2", "gamma_regularizer": "l2"}
    ours, keras_own = pair(**options)
    x = normal(*shape)
    assert ours(x, training=True).shape == shape
    keras_own(x, training=True)
    assert [w.name for w in ours.weights] == [w.name for w in keras_own.weights]
    assert len(ours.trainable_weights) == center + scale
    assert len(ours.non_trainable_weights) == 2
    assert len(ours.losses) == center + scale
    assert ours.compute_output_shape((None, *shape[1:])) == (None, *shape[1:])
    assert ours(keras.Input(shape[1:])).shape == (None, *shape[1:])
    assert ours.supports_masking
    assert ours.count_params() == keras_own.count_params()
    ours.set_weights(keras_own.get_weights())


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("shape", [(5, 2, 3), (5, 3, 3, 2)], ids=str)
@pytest.mark.parametrize("start", ["zeros", "ones"])
def test_normalizes(axis: int, shape: tuple[int, ...], start: str) -> None:
    layer = SyncBatchNormalization(
        axis=axis, momentum=0, moving_mean_initializer=start, moving_variance_initializer=start, epsilon=1e-5
    )
    x = normal(*shape)
    before = layer(x, training=False)
    y = layer(layer(layer(x, training=True), training=True), training=True).numpy()
    axes = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    np.testing.assert_allclose(y.mean(axes), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(axes), 1, atol=1e-3)
    np.testing.assert_allclose(layer.moving_mean, 0, atol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, 1, atol=1e-3)
    trained = layer(x, training=True).numpy()
    assert not np.allclose(before, trained, atol=1e-2)
    # Without momentum the moving statistics are the last batch's.
    np.testing.assert_allclose(layer(x, training=False), trained, atol=1e-5)


@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_close_to_keras_own(axis: int) -> None:
    ours, theirs = pair(axis=axis, momentum=0.8, gamma_initializer="uniform")
    x, dy = normal(6, 5, 4, 3), normal(6, 5, 4, 3, seed=1)
    ours.build(x.shape)
    theirs.build(x.shape)
    theirs.set_weights(ours.get_weights())
    results = []
    for layer in (ours, theirs):
        with tf.GradientTape() as tape:
            inputs = tf.constant(x)
            tape.watch(inputs)
            y = layer(inputs, training=True)
        sources = [inputs, *(w.value for w in layer.trainable_weights)]
        gradients = tape.gradient(y, sources, output_gradients=tf.constant(dy))
        results.append([y, *gradients, *layer.get_weights(), layer(x, training=False)])
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


def test_frozen() -> None:
    layer = SyncBatchNormalization(momentum=0.8, epsilon=1e-7)
    layer.build((1, 4, 4, 3))
    layer.trainable = False
    assert (len(layer.weights), len(layer.trainable_weights)) == (4, 0)
    x = normal(200, 4, 4, 3)
    np.testing.assert_allclose(layer(x, training=True), x, rtol=1e-5)
    layer.trainable = True
    assert len(layer.trainable_weights) == 2
    y = layer(x, training=True).numpy()
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-4)
    assert layer.moving_mean.numpy().all()


def test_inherits_training_from_the_call_above() -> None:
    layer = SyncBatchNormalization()
    model = keras.Sequential([keras.Input((3,)), layer])
    model(normal(8, 3))
    assert not layer.moving_mean.numpy().any()
    model(normal(8, 3), training=True)
    assert layer.moving_mean.numpy().all()


@pytest.mark.parametrize("run_eagerly", [True, False])
@pytest.mark.parametrize("mask_value", [0.0, 0.1, 1.0])
def test_fit_ignores_masked_values(run_eagerly: bool, mask_value: float) -> None:
    x = np.array([[[1, 5], [2, 5], [mask_value] * 2, [mask_value] * 2]] * 10, np.float32)
    inputs = layers.Input((None, 2))
    layer = SyncBatchNormalization(momentum=0.0)
    model = keras.Model(inputs, layer(layers.Masking(mask_value)(inputs)))
    model.compile("rmsprop", "mse", run_eagerly=run_eagerly)
    model.fit(x, x, batch_size=10, epochs=2, verbose=0)
    np.testing.assert_array_equal(layer.moving_mean, [1.5, 5.0])
    np.testing.assert_array_equal(layer.moving_variance, [0.25, 0.0])


def test_masks() -> None:
    """One that broadcasts, none unmasked, and that a masked output stays masked."""
    ones = np.ones((1, 2, 3, 4), np.float32)
    layer = SyncBatchNormalization(momentum=0.0)
    np.testing.assert_array_equal(layer(ones, training=True, mask=np.ones((1, 2, 1))), np.zeros_like(ones))
    np.testing.assert_array_equal(layer.moving_mean, np.ones(4))
    np.testing.assert_array_equal(layer.moving_variance, np.zeros(4))
    layer = SyncBatchNormalization(scale=False, center=False)
    zeros = np.zeros((4, 5), np.float32)
    np.testing.assert_array_equal(layer(zeros, mask=np.zeros(4), training=True), zeros)
    masked = layers.Masking()(np.array([[[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]]))
    layer = SyncBatchNormalization()
    for residual in (None, tf.zeros((1, 3, 2))):
        y = layer(masked, training=True, residual=residual)
        np.testing.assert_array_equal(y._keras_mask, [[True, False, True]])
        np.testing.assert_allclose(y[0, 0] + y[0, 2], [0, 0], atol=1e-6)


def test_weights_keep_their_dtype_in_an_autocast_scope() -> None:
    layer = SyncBatchNormalization(dtype="mixed_float16")
    layer.build((1, 3))
    layer.moving_variance.assign(np.full(3, 70000))  # infinite in float16
    assert np.isfinite(layer(np.ones((2, 3), np.float16))).all()
    np.testing.assert_array_equal(layer.moving_variance, np.full(3, 70000))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("training", [True, False])
def test_dtype_policies(policy: str, training: bool) -> None:
    layer = SyncBatchNormalization(dtype=policy, activation="relu")
    x = normal(8, 4, 3)
    y = layer(x, training=training, residual=x)
    assert y.dtype.name == layer.compute_dtype == policy.removeprefix("mixed_")
    assert {w.dtype for w in layer.weights} == {"float32" if policy.startswith("mixed") else policy}
    assert np.isfinite(y).all()


def test_config() -> None:
    layer = SyncBatchNormalization(
        axis=1, momentum=0.5, epsilon=0.1, center=False, activation="relu", unbiased_variance=True, process_set=[0], name="a",
        skip_nonfinite=False, gamma_initializer="zeros", gamma_constraint="non_neg",
    )  # fmt: skip
    config = layer.get_config()
    assert config["process_set"] == [0]
    copy = SyncBatchNormalization.from_config(config)
    assert copy.get_config() == config
    assert (copy.activation, copy.unbiased_variance, copy.axis, copy.name) == ("relu", True, 1, "a")
    assert copy.skip_nonfinite is False and SyncBatchNormalization().get_config()["skip_nonfinite"] is True
    ours = {"process_set", "activation", "unbiased_variance", "zero_debias", "skip_nonfinite"}
    assert config.keys() - layers.BatchNormalization().get_config().keys() == ours
    plain = layers.BatchNormalization.from_config({k: v for k, v in config.items() if k not in ours})
    assert plain.get_config().items() <= config.items()


# ---- Ours


@pytest.mark.parametrize("training", [True, False])
def test_residual_and_activation(training: bool) -> None:
    x, residual = normal(6, 4, 3), normal(6, 4, 3, seed=1)
    y = SyncBatchNormalization()(x, training=training)
    fused = SyncBatchNormalization(activation="relu")(x, training=training, residual=residual)
    apart = np.maximum(y + residual, np.float32(0))
    if training:  # a residual that is fused is rounded less often: by half a unit in the last place of each step's result
        np.testing.assert_allclose(fused, apart, rtol=2.0**-23, atol=2.0**-20)
    else:
        assert same_bits(fused, apart)
    inputs = [keras.Input((4, 3)), keras.Input((4, 3))]
    model = keras.Model(inputs, SyncBatchNormalization(activation="relu")(inputs[0], residual=inputs[1]))
    assert same_bits(model([x, residual], training=training), fused)


def test_unbiased_variance() -> None:
    x = normal(5, 3)
    layer = SyncBatchNormalization(momentum=0.0, unbiased_variance=True)
    layer(x, training=True)
    np.testing.assert_allclose(layer.moving_variance, x.var(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize("shape", [(4, 5, 6), (3, 4, 5, 6)])
def test_masks_of_every_axis(axis: int, shape: tuple[int, ...]) -> None:
    """A mask has the shape of the inputs without the channels' axis; the bytes are those of channels last."""
    x, mask = normal(*shape), normal(*np.delete(shape, axis)) > 0
    layer, last = SyncBatchNormalization(axis=axis), SyncBatchNormalization()
    results = []
    for norm, inputs in ((layer, x), (last, np.moveaxis(x, axis, -1))):
        tensor = tf.constant(inputs)
        with tf.GradientTape() as outer:
            outer.watch(tensor)
            with tf.GradientTape() as tape:
                tape.watch(tensor)
                y = norm(tensor, training=True, mask=mask)
                loss = tf.reduce_sum(y**3)
            dx = tape.gradient(loss, tensor)
            penalty = tf.reduce_sum(dx**2)
        results.append([y, dx, outer.gradient(penalty, tensor)])
    got, want = ([np.moveaxis(t.numpy(), to, -1) for t in tensors] for tensors, to in zip(results, (axis, -1), strict=True))
    assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])
    np.testing.assert_allclose(got[2], want[2], rtol=1e-3, atol=1e-4)  # the bits of second derivatives are not promised
    assert abs(want[2]).max() > 0.01
    assert same_bits(layer.moving_mean.numpy(), last.moving_mean.numpy())
    unmasked = np.moveaxis(x, axis, -1)[mask]
    np.testing.assert_allclose(layer.moving_mean, unmasked.mean(0) * np.float32(0.01), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"synchronized": True}, "synchronized=True"),
        ({"virtual_batch_size": 4}, "virtual_batch_size=4"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"fused": True}, "fused"),
    ],
)
def test_refused_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyncBatchNormalization(**options)


@pytest.mark.parametrize("training", [True, False])
def test_bad_input(training: bool) -> None:
    layer = SyncBatchNormalization()
    layer.build((None, 4, 3))
    with pytest.raises(ValueError, match=r"residual.shape=\(4, 3\)"):
        layer(normal(2, 4, 3), residual=normal(4, 3), training=training)
    with pytest.raises(ValueError, match="expected axis -1"):
        layer(normal(2, 4, 5), training=training)
    with pytest.raises(ValueError, match="one dimension less"):
        layer(normal(2, 4, 3), mask=np.ones((2, 4, 3)), training=training)


def test_bad_input_in_training() -> None:
    with pytest.raises(TypeError, match="int32"):
        SyncBatchNormalization()(np.ones((4, 3), np.int32), training=True)
    with pytest.raises(ValueError, match="at least 2 dims"):
        SyncBatchNormalization()(np.ones(3, np.float32), training=True)
    with pytest.raises(ValueError, match=r"leaves out positions, not channels.*mask.shape=\(2, 4\).*axis=1"):
        SyncBatchNormalization(axis=1)(normal(2, 4, 3), mask=np.ones((2, 4)), training=True)
    masked = layers.Masking()(normal(2, 3, 3))
    with pytest.raises(ValueError, match=r"mask of the layer before .*axis=1.*mask.shape=\(2, 3\).*use `axis=-1`"):
        SyncBatchNormalization(axis=1)(masked, training=True)
    layer = SyncBatchNormalization(name="lonely")
    with pytest.raises(ValueError, match=r"more than 1 value per channel .*'lonely'"):
        layer(np.ones((1, 3), np.float32), training=True)
    assert not layer.moving_mean.numpy().any()


def test_process_set_by_ranks() -> None:
    layer = SyncBatchNormalization(process_set=[0])
    layer(normal(4, 3), training=True)  # on one rank, [0] are all
    layer = SyncBatchNormalization(process_set=[0, 1], name="pair")
    layer(normal(4, 3))
    with pytest.raises(ValueError, match=r"'pair'.*ranks=\[0, 1\]"):
        layer(normal(4, 3), training=True)
    assert SyncBatchNormalization(process_set=hvd.global_process_set).get_config()["process_set"] is None


def test_compile_leaves_xla_alone() -> None:
    model = keras.Sequential([keras.Input((3,)), SyncBatchNormalization()])
    model.compile("sgd", "mse")
    assert not model.jit_compile
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        model.compile("sgd", "mse", jit_compile=True)
    assert not model.jit_compile


# ---- Models


class Block(layers.Layer):
    """Layers in attributes, a list and a dict."""

    def __init__(self, shared: layers.Layer | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.first = layers.BatchNormalization()
        self.more = [layers.Dense(3), layers.BatchNormalization()]
        self.by_name = {"last": layers.BatchNormalization(trainable=False)}
        self.shared = shared

    def build(self, shape: tuple[int | None, ...]) -> None:
        for layer in (self.first, *self.more, *self.by_name.values()):
            layer.build(shape)

    def call(self, x: Any) -> Any:
        for layer in (self.first, *self.more, self.by_name["last"], *([self.shared] if self.shared else [])):
            x = layer(x)
        return x


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.norm = layers.BatchNormalization()
        self.block = Block(self.norm)

    def call(self, x: Any) -> Any:
        return self.block(self.norm(x))


def functional() -> keras.Model:
    inputs = keras.Input((5, 3))
    shared = layers.BatchNormalization(name="shared")
    inner = keras.Sequential([layers.Dense(3), layers.BatchNormalization()], name="inner")
    x = shared(inner(shared(inputs)))
    x = layers.TimeDistributed(layers.BatchNormalization(momentum=0.5), name="steps")(x)
    return keras.Model(inputs, Block(name="block")(x))


def sequential() -> keras.Model:
    return keras.Sequential([keras.Input((5, 3)), layers.BatchNormalization(), layers.ReLU(), layers.BatchNormalization()])


NAMES = {
    functional: [
        "shared",
        "inner.batch_normalization",
        "steps.layer",
        "block.first",
        "block.more.1",
        "block.by_name.last",
    ],
    sequential: ["batch_normalization", "batch_normalization_1"],
    Subclassed: ["norm", "block.first", "block.more.1", "block.by_name.last"],
}


def norms(model: keras.Model) -> list[Any]:
    return [x for x in model._flatten_layers() if isinstance(x, layers.BatchNormalization)]


@pytest.mark.parametrize("make", NAMES, ids=lambda make: make.__name__)
def test_convert_and_revert(make: Any) -> None:
    keras.utils.set_random_seed(0)
    layers.BatchNormalization()  # counts in Keras's names, not in ours
    model = make()
    x = normal(8, 5, 3)
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    model.fit(x, x, verbose=0)
    before = {id(layer): (layer.name, layer.trainable, layer.get_weights()) for layer in norms(model)}
    expected = model(x, training=True).numpy()
    model.set_weights([w for w in model.get_weights()])
    weights, optimizer = model.get_weights(), model.optimizer.variables

    assert convert_sync_batchnorm(model) is model
    assert {type(layer) for layer in norms(model)} == {SyncBatchNormalization}
    assert sorted(layer.collective_name for layer in norms(model)) == sorted(
        f"{make.__name__.lower()}.{path}" for path in NAMES[make]
    )
    assert {id(layer) for layer in norms(model)} == before.keys()
    for layer in norms(model):
        assert before[id(layer)][:2] == (layer.name, layer.trainable)
    for a, b in zip(model.get_weights(), weights, strict=True):
        assert same_bits(a, b)
    np.testing.assert_allclose(model(x, training=True), expected, rtol=1e-4, atol=1e-4)
    model.fit(x, x, verbose=0)
    assert all(a is b for a, b in zip(model.optimizer.variables, optimizer, strict=True))

    evaluated = model(x).numpy()
    assert revert_sync_batchnorm(model) is model
    assert {type(layer) for layer in norms(model)} == {layers.BatchNormalization}
    assert same_bits(model(x), evaluated)
    model.fit(x, x, verbose=0)
    for layer in norms(model):
        assert layer.get_config() == layers.BatchNormalization.from_config(layer.get_config()).get_config()


def test_convert_before_building() -> None:
    model = convert_sync_batchnorm(keras.Sequential([layers.Dense(3), layers.BatchNormalization()]))
    y = model(normal(8, 3), training=True)
    np.testing.assert_allclose(y.numpy().mean(0), 0, atol=1e-5)
    assert model.layers[1].moving_mean.numpy().all()


def test_convert_a_layer() -> None:
    layer = layers.BatchNormalization(name="alone")
    assert convert_sync_batchnorm(layer) is layer
    assert isinstance(layer, SyncBatchNormalization)
    assert layer.collective_name == "alone"


def test_convert_again() -> None:
    model = convert_sync_batchnorm(sequential(), process_set=[0])
    assert model.layers[0].process_set == (0,)
    convert_sync_batchnorm(model)
    assert model.layers[0].process_set is None


def test_convert_what_it_cannot() -> None:
    class Own(layers.BatchNormalization):
        pass

    model = keras.Sequential([layers.BatchNormalization(), Own()])
    with pytest.warns(UserWarning, match=r"'own' is left unchanged.*Own"):
        convert_sync_batchnorm(model)
    assert [type(x) for x in model.layers] == [SyncBatchNormalization, Own]
    model = keras.Sequential([SyncBatchNormalization(), SyncBatchNormalization(activation="relu")])
    with pytest.raises(ValueError, match="activation='relu'"):
        revert_sync_batchnorm(model)
    assert type(model.layers[0]) is SyncBatchNormalization


def test_an_old_keras_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"not synchronized\. Received: Keras 3\.9\.2"):
        warn_if_older("3.9.2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("3.10.0", "3.15.1", "4.0.0"):
            warn_if_older(version)


def test_save_and_load(tmp_path: Path) -> None:
    x = normal(32, 5, 3)
    inputs = keras.Input((5, 3))
    y = SyncBatchNormalization(activation="relu", process_set=[0])(layers.Dense(3)(inputs), residual=inputs)
    model = convert_sync_batchnorm(keras.Model(inputs, layers.BatchNormalization()(y)))
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), "mse")
    model.fit(x, x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [type(layer) for layer in norms(loaded)] == [SyncBatchNormalization] * 2
    assert same_bits(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    for m in (model, loaded):
        m.fit(x, x, shuffle=False, verbose=0)
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        assert same_bits(a, b)
    clone = keras.models.clone_model(model)
    for other in (loaded, clone):
        assert [layer.get_config() for layer in norms(other)] == [layer.get_config() for layer in norms(model)]
        assert [layer.collective_name for layer in norms(other)] == [layer.collective_name for layer in norms(model)]


def run_python(code: str, *arguments: str, **environment: str) -> str:
    env = {"TF_CPP_MIN_LOG_LEVEL": "3", "PATH": ""} | environment
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SERVE = """
import sys
sys.modules["horovod"] = None
import numpy as np, tensorflow as tf
served = tf.saved_model.load(sys.argv[1])
x = np.load(sys.argv[2])
np.save(sys.argv[3], served.serve(x))
assert "hvd_syncbn" not in sys.modules
"""

LOAD = """
import sys
sys.modules["horovod"] = None
import numpy as np, keras
import hvd_syncbn.keras
from hvd_syncbn import native
native.find = None  # the native library is not touched
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0))
"""


def test_export_and_evaluation_need_neither_horovod_nor_the_library(tmp_path: Path) -> None:
    x = normal(4, 5, 3)
    inputs = keras.Input((5, 3))
    model = keras.Model(inputs, SyncBatchNormalization(activation="relu")(layers.Dense(3)(inputs), residual=inputs))
    model(x, training=True)
    model.export(tmp_path / "served", verbose=False)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    expected = model.predict(x, verbose=0)
    for code, name in ((SERVE, "served"), (LOAD, "model.keras")):
        run_python(code, str(tmp_path / name), str(tmp_path / "x.npy"), str(tmp_path / "y.npy"))
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-6)


OTHER_BACKEND = """
import sys
import numpy as np, keras
from hvd_syncbn.keras import SyncBatchNormalization, convert_sync_batchnorm, freeze_batchnorm
x = np.random.default_rng(0).normal(size=(6, 5, 4, 3)).astype("float32")
model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.BatchNormalization()])
model.layers[0].moving_mean.assign([1.0, 2.0, 3.0])
expected = model.predict(x, verbose=0)
convert_sync_batchnorm(model)
assert (model.predict(x, verbose=0) == expected).all()
try:
    model.layers[0](x, training=True)
except RuntimeError as error:
    print(str(error).splitlines()[-1] if "KERAS_BACKEND" in str(error).splitlines()[-1] else error)
frozen = freeze_batchnorm(model).layers[0](x, training=True)
assert (keras.ops.convert_to_numpy(frozen.detach()) == expected).all()
assert "tensorflow" not in sys.modules
"""


def test_other_backend() -> None:
    """Keras's PyTorch backend evaluates; training is an error."""
    need("torch")
    printed = run_python(OTHER_BACKEND, KERAS_BACKEND="torch")
    assert "needs Keras's TensorFlow backend" in printed
    assert "Received: KERAS_BACKEND=torch" in printed
