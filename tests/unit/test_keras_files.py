"""Files cross between plain and synchronized layers, in every format, direction and kind of model; what cannot is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytest.importorskip("horovod")

import horovod.tensorflow as hvd  # noqa: E402
import keras  # noqa: E402
from keras import layers  # noqa: E402

from hvd_syncbn.keras import (  # noqa: E402
    DistributedOptimizer,
    SyncBatchNormalization,
    convert_sync_batchnorm,
    load_model,
    revert_sync_batchnorm,
)
from hvd_syncbn.tf_impl.keras.optimizer import is_distributed  # noqa: E402
from tests.arrays import same_bits  # noqa: E402

pytestmark = pytest.mark.timeout(300)
registered = keras.saving.register_keras_serializable("test_keras_files")
X = np.random.default_rng(0).normal(2.0, 3.0, (4, 3)).astype(np.float32)
Norm: type[Any] = layers.BatchNormalization  # what the models below are made of


@pytest.fixture(autouse=True, scope="module")
def _horovod() -> None:
    hvd.init()


@registered
class Own(layers.Layer):
    """Norms in an attribute, a list, a dict and an inner model, made by the class."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm = Norm()
        self.more = [layers.Dense(3), Norm()]
        self.named = {"a": Norm()}
        self.body = keras.Sequential([layers.Dense(3), Norm(), Norm()])

    def build(self, shape: Any) -> None:
        for layer in (self.norm, *self.more, *self.named.values(), self.body):
            layer.build(shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        for layer in (self.norm, *self.more, *self.named.values(), self.body):
            x = layer(x) if isinstance(layer, layers.Dense) else layer(x, training=training)
        return x


@registered
class Net(keras.Model):
    """A model of the issue: a Sequential made by the class."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.body = keras.Sequential([layers.Dense(4), Norm()])
        self.last = Norm()

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.last(self.body(x, training=training), training=training)


def sequential() -> Any:
    return keras.Sequential([keras.Input((3,)), layers.Dense(4), Norm(), layers.Dense(3), Norm()])


def functional() -> Any:
    inputs = keras.Input((3,))
    inner = keras.Sequential([layers.Dense(3), Norm()])
    x = layers.Reshape((3,))(layers.TimeDistributed(Norm())(layers.Reshape((1, 3))(Norm()(inner(inputs)))))
    return keras.Model(inputs, layers.Add()([inputs, x]))


def subclassed() -> Any:
    model = Net()
    model(X)
    return model


def custom() -> Any:
    return keras.Sequential([keras.Input((3,)), Norm(), Own()])


KINDS = {"sequential": sequential, "functional": functional, "subclassed": subclassed, "custom": custom}
STATES = ["plain", "converted", "hand-made"]


def make(kind: str, state: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys.modules[__name__], "Norm", SyncBatchNormalization if state == "hand-made" else Norm_)
    keras.utils.clear_session(free_memory=False)
    model = KINDS[kind]()
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape).astype(w.dtype) for w in model.get_weights()])
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    return convert_sync_batchnorm(model) if state == "converted" else model


Norm_ = layers.BatchNormalization


def norms(model: Any) -> list[Any]:
    return [x for x in model._flatten_layers() if isinstance(x, layers.BatchNormalization)]


def kinds_of_norms(model: Any) -> list[bool]:
    return [isinstance(x, SyncBatchNormalization) for x in norms(model)]


def assert_equal(model: Any, other: Any) -> None:
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        assert same_bits(a, b)
    assert same_bits(model(X), other(X))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved", STATES)
@pytest.mark.parametrize("extension", [".keras", ".weights.h5", ".h5"])
def test_weights_cross(kind: str, saved: str, extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a model of each state into one of each state."""
    path = tmp_path / f"model{extension}"
    source = make(kind, saved, 1, monkeypatch)
    if extension == ".weights.h5":
        source.save_weights(path)
    else:
        source.save(path)
    for state in STATES:
        target = make(kind, state, 2, monkeypatch)
        expected = kinds_of_norms(target)
        assert not same_bits(target(X), source(X))
        target.load_weights(path)
        assert_equal(target, source)
        assert kinds_of_norms(target) == expected
        if extension == ".h5" and kind in ("sequential", "functional"):
            target = make(kind, state, 2, monkeypatch)
            target.load_weights(path, by_name=True)
            assert_equal(target, source)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved", STATES)
@pytest.mark.parametrize("extension", [".keras", "folder", ".h5"])
def test_models_come_back(kind: str, saved: str, extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Keras and by ours: equal; and which come back synchronized."""
    path = tmp_path / f"model{extension}"
    source = make(kind, saved, 1, monkeypatch)
    source.train_on_batch(X, np.ones_like(source(X)))
    if extension == "folder":
        keras.saving.save_model(source, path, zipped=False)
    else:
        source.save(path)
    # Keras can load neither the losses nor, without help, the class of the model from an .h5 file.
    options = {"custom_objects": {"Net": Net}, "compile": extension != ".h5"}
    if extension == ".h5" and kind == "subclassed":  # Keras loads none: the model has not made its variables
        for load in (keras.models.load_model, load_model):
            with pytest.raises(ValueError, match="Layer count mismatch"):
                load(path, **options)
        return
    by_keras = keras.models.load_model(path, **options)
    assert_equal(by_keras, source)
    assert extension == ".h5" or not is_distributed(by_keras.optimizer)
    made_by_class = {"sequential": [], "functional": [], "subclassed": "all", "custom": "all but the first"}[kind]
    was, now = kinds_of_norms(source), kinds_of_norms(by_keras)
    lost = saved == "converted" and made_by_class
    assert now == ([w and not (lost and (i or made_by_class == "all")) for i, w in enumerate(was)])
    if lost and extension == ".h5":
        with pytest.warns(UserWarning, match=r"legacy \.h5.*Received: filepath="):
            ours = load_model(path, **options)
        assert kinds_of_norms(ours) == now
    else:
        ours = load_model(path, **options)
        assert kinds_of_norms(ours) == was
        for a, b in zip(norms(ours), norms(source), strict=True):
            if saved == "converted":
                assert (a.collective_name, a.process_set) == (b.collective_name, b.process_set)
    assert_equal(ours, source)
    if extension != ".h5":
        assert is_distributed(ours.optimizer)
        for a, b in zip(ours.optimizer.variables, source.optimizer.variables, strict=True):
            assert same_bits(a.numpy(), b.numpy())


def test_model_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = (make("sequential", state, seed, monkeypatch) for seed, state in enumerate(("converted", "plain")))
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "c.weights.h5", save_weights_only=True)
    source.fit(X, X, verbose=0, callbacks=[checkpoint])
    target.load_weights(tmp_path / "c.weights.h5")
    assert_equal(target, source)


def test_some_of_a_custom_class_and_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just the layers that were synchronized are so again, with their process set; a mixture stays one."""
    model = make("custom", "plain", 1, monkeypatch)
    convert_sync_batchnorm(model.layers[1].body, process_set=[0])
    model.save(tmp_path / "model.keras")
    ours = load_model(tmp_path / "model.keras")
    assert kinds_of_norms(ours) == kinds_of_norms(model)
    assert sum(kinds_of_norms(ours)) == 2
    assert {x.process_set for x in norms(ours.layers[1].body)} == {(0,)}
    ours.fit(X, X, verbose=0)


def test_load_model_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("sequential", "converted", 1, monkeypatch)
    model.compile(DistributedOptimizer(keras.optimizers.SGD()), "mse")
    model.save(tmp_path / "model.keras")
    loaded = load_model(tmp_path / "model.keras", backward_passes_per_step=3, name="mine")
    assert loaded.optimizer._averager.get_config()["backward_passes_per_step"] == 3
    assert loaded.optimizer._averager.name == "mine"
    assert not load_model(tmp_path / "model.keras", compile=False).compiled

    class Unregistered(keras.optimizers.SGD):
        pass

    model.compile(Unregistered(), "mse")
    model.save(tmp_path / "model.keras")
    assert isinstance(load_model(tmp_path / "model.keras", custom_optimizers=[Unregistered]).optimizer, Unregistered)


ELSEWHERE = """
import sys
sys.modules["hvd_syncbn"] = None
import numpy as np, keras
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[2], model(np.load(sys.argv[3])))
"""


def test_where_hvd_syncbn_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `revert_sync_batchnorm` it loads, with a distributed optimizer; else Keras's error names our package."""
    model = make("functional", "converted", 1, monkeypatch)
    model.compile(DistributedOptimizer(keras.optimizers.SGD()), "mse")
    np.save(tmp_path / "x.npy", X)
    arguments = [str(tmp_path / name) for name in ("model.keras", "y.npy", "x.npy")]
    for reverted in (False, True):
        (revert_sync_batchnorm(model) if reverted else model).save(arguments[0])
        command = [sys.executable, "-c", ELSEWHERE, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert (done.returncode == 0) is reverted, done.stderr
        assert reverted or "hvd_syncbn>SyncBatchNormalization" in done.stderr
    assert same_bits(np.load(arguments[1]), model(X))


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, revert_sync_batchnorm])
def test_wrong_calls(convert: Any) -> None:
    model = keras.Sequential([Norm_()])
    for wrong in (None, [model], (model, model), {"a": model}, keras.Model, "model", 3, X, keras.Input((3,)), object()):
        with pytest.raises(TypeError, match=r"(?s)Keras 3.*Received: "):
            convert(wrong)
    tf_keras = pytest.importorskip("tf_keras")
    for wrong in (tf_keras.Sequential([tf_keras.layers.BatchNormalization()]), tf_keras.layers.BatchNormalization()):
        with pytest.raises(TypeError, match=r"tf_keras \(Keras 2\) is another library. Received: .*tf_keras"):
            convert(wrong)


def test_nothing_to_convert() -> None:
    model = keras.Sequential([layers.Dense(1)])
    with pytest.warns(UserWarning, match=r"no BatchNormalization to convert.*Received: <Sequential"):
        convert_sync_batchnorm(model)
    with pytest.warns(UserWarning, match=r"no SyncBatchNormalization to convert.*Received: <Sequential"):
        revert_sync_batchnorm(keras.Sequential([Norm_()]))


def test_names_that_files_and_people_see() -> None:
    layer = SyncBatchNormalization()
    assert repr(layer) == f"<SyncBatchNormalization name={layer.name}, built=False>"
    assert layer.name.startswith("batch_normalization")
    serialized = keras.saving.serialize_keras_object(layer)
    assert serialized["registered_name"] == "hvd_syncbn>SyncBatchNormalization"
    assert type(keras.saving.deserialize_keras_object(serialized)) is SyncBatchNormalization
