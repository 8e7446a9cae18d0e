"""Files cross between plain and synchronized layers, in every format, direction and kind of model; what cannot is refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import subprocess
import sys
from collections.abc import Iterator
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
    freeze_batchnorm,
    load_model,
    revert_sync_batchnorm,
    unfreeze_batchnorm,
)
from hvd_syncbn.tf_impl.keras.training.optimizer import is_distributed  # noqa: E402
from tests.arrays import same_bits  # noqa: E402

pytestmark = pytest.mark.timeout(300)
registered = keras.saving.register_keras_serializable("test_keras_files")
X = np.random.default_rng(0).normal(2.0, 3.0, (4, 3)).astype(np.float32)
Norm: type[Any] = layers.BatchNormalization  # what the models below are made of
FOLDER: Path


@pytest.fixture(autouse=True, scope="module")
def _horovod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("files")
    hvd.init()
    yield
    source.cache_clear()
    target.cache_clear()


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


Norm_: type[Any] = layers.BatchNormalization


def make(kind: str, state: str, seed: int = 1) -> Any:
    global Norm
    Norm = SyncBatchNormalization if state == "hand-made" else Norm_
    keras.utils.clear_session(free_memory=False)
    model = KINDS[kind]()
    Norm = Norm_
    set_weights(model, seed)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    return convert_sync_batchnorm(model) if state == "converted" else model


def set_weights(model: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape).astype(w.dtype) for w in model.get_weights()])


@dataclasses.dataclass
class Source:
    """A model with an optimizer that has a state, and the files of it."""

    model: Any
    outputs: np.ndarray
    files: dict[str, Path]


@functools.cache
def source(kind: str, state: str) -> Source:
    model = make(kind, state)
    # As after a step, and without tracing one.
    optimizer, variables = model.optimizer, model.trainable_variables
    optimizer.apply([keras.ops.ones_like(variable) for variable in variables], variables)
    assert all(v.numpy().all() for v in optimizer.variables)
    folder = FOLDER / f"{kind}-{state}"
    folder.mkdir()
    files = {extension: folder / f"model{extension}" for extension in (".keras", ".weights.h5", ".h5", "folder")}
    model.save(files[".keras"])
    model.save_weights(files[".weights.h5"])
    model.save(files[".h5"])
    keras.saving.save_model(model, files["folder"], zipped=False)
    return Source(model, model(X).numpy(), files)


@functools.cache
def target(kind: str, state: str) -> Any:
    return make(kind, state)


def norms(model: Any) -> list[Any]:
    return [x for x in model._flatten_layers() if isinstance(x, layers.BatchNormalization)]


def kinds_of_norms(model: Any) -> list[bool]:
    return [isinstance(x, SyncBatchNormalization) for x in norms(model)]


def assert_equal(model: Any, saved: Source) -> None:
    for a, b in zip(model.get_weights(), saved.model.get_weights(), strict=True):
        assert same_bits(a, b)
    assert same_bits(model(X), saved.outputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved", STATES)
@pytest.mark.parametrize("extension", [".keras", ".weights.h5", ".h5"])
def test_weights_cross(kind: str, saved: str, extension: str) -> None:
    """From a model of each state into one of each state."""
    file = source(kind, saved).files[extension]
    for state in STATES:
        model = target(kind, state)
        expected = kinds_of_norms(model)
        for by_name in (False, True) if extension == ".h5" and kind in ("sequential", "functional") else (False,):
            set_weights(model, 2)
            assert not same_bits(model(X), source(kind, saved).outputs)
            model.load_weights(file, **{"by_name": True} if by_name else {})
            assert_equal(model, source(kind, saved))
        assert kinds_of_norms(model) == expected == kinds_of_norms(source(kind, state).model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved", STATES)
@pytest.mark.parametrize("extension", [".keras", "folder", ".h5"])
def test_models_come_back(kind: str, saved: str, extension: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Keras and by ours: equal; and which come back synchronized."""
    model, path = source(kind, saved).model, source(kind, saved).files[extension]
    monkeypatch.setattr(sys.modules[__name__], "Norm", SyncBatchNormalization if saved == "hand-made" else Norm_)
    # Keras can load neither the losses nor, without help, the class of the model from an .h5 file.
    options: dict[str, Any] = {"custom_objects": {"Net": Net}, "compile": extension != ".h5"}
    if extension == ".h5" and kind == "subclassed":  # Keras loads none: the model has not made its variables
        for load in (keras.models.load_model, load_model):
            with pytest.raises(ValueError, match="Layer count mismatch"):
                load(path, **options)
        return
    by_keras = keras.models.load_model(path, **options)
    assert_equal(by_keras, source(kind, saved))
    assert extension == ".h5" or not is_distributed(by_keras.optimizer)
    made_by_class = {"sequential": [], "functional": [], "subclassed": "all", "custom": "all but the first"}[kind]
    was, now = kinds_of_norms(model), kinds_of_norms(by_keras)
    lost = saved == "converted" and made_by_class
    assert now == ([w and not (lost and (i or made_by_class == "all")) for i, w in enumerate(was)])
    if lost and extension == ".h5":
        with pytest.warns(UserWarning, match=r"legacy \.h5.*Received: filepath="):
            ours = load_model(path, **options)
        assert kinds_of_norms(ours) == now
    else:
        ours = load_model(path, **options)
        assert kinds_of_norms(ours) == was
        for a, b in zip(norms(ours), norms(model), strict=True):
            if saved == "converted":
                assert (a.collective_name, a.process_set) == (b.collective_name, b.process_set)
    assert_equal(ours, source(kind, saved))
    if extension != ".h5":
        assert is_distributed(ours.optimizer)
        assert_same_state(ours.optimizer, model.optimizer)


def assert_same_state(optimizer: Any, other: Any) -> None:
    for a, b in zip(optimizer.variables, other.variables, strict=True):
        assert same_bits(a.numpy(), b.numpy())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_norms_come_back(kind: str, state: str, tmp_path: Path) -> None:
    """Frozen, synchronized or plain as they were, whatever they were made by; the last one is not frozen."""
    model = make(kind, state)
    with_affine, last = STATES.index(state) % 2 == 0, norms(model)[-1]
    freeze_batchnorm(model, affine=with_affine)
    unfreeze_batchnorm(last)
    model.save(tmp_path / "model.keras")
    loaded = load_model(tmp_path / "model.keras")
    expected = ["statistics" if with_affine else "all"] * (len(norms(model)) - 1) + [None]
    assert [getattr(norm, "frozen", None) for norm in norms(loaded)] == expected
    assert [type(norm) for norm in norms(loaded)] == [type(norm) for norm in norms(model)]
    assert len(loaded.trainable_variables) == len(model.trainable_variables)
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        assert same_bits(a, b)
    before = [norm.get_weights() for norm in norms(loaded)]
    loaded(X, training=True)
    for norm, (*_, mean, variance) in zip(norms(loaded), before, strict=True):
        stays = getattr(norm, "frozen", None) is not None
        assert (same_bits(norm.moving_mean.numpy(), mean) and same_bits(norm.moving_variance.numpy(), variance)) == stays


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("scaled", [False, True])
def test_copies_of_a_model_average(copied: Any, scaled: bool) -> None:
    """Distributed again, with the same settings and a state of its own; a file holds the plain optimizer all the same."""
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    optimizer: Any = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer = DistributedOptimizer(optimizer, "mine", backward_passes_per_step=2, compression=hvd.Compression.fp16)
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer
    model.compile(optimizer, "mse")
    model.train_on_batch(X, X[:, :2])
    model.train_on_batch(X, X[:, :2])
    duplicate = copied(model)
    assert type(duplicate.optimizer) is type(optimizer)
    assert is_distributed(duplicate.optimizer)
    a, b = ((x.inner_optimizer if scaled else x)._averager for x in (optimizer, duplicate.optimizer))
    assert a.get_config() == b.get_config() and a.get_config()["backward_passes_per_step"] == 2
    assert_same_state(duplicate.optimizer, optimizer)
    before = [v.numpy() for v in [*duplicate.weights, *duplicate.optimizer.variables]]
    for one in (model, duplicate):  # in turn: the accumulators are each one's own
        one.train_on_batch(X, X[:, :2])
    model.train_on_batch(X, X[:, :2])
    for v, value in zip([*duplicate.weights, *duplicate.optimizer.variables][:2], before, strict=False):
        assert same_bits(v.numpy(), value)
    duplicate.train_on_batch(X, X[:, :2])
    for u, v in zip(model.get_weights(), duplicate.get_weights(), strict=True):
        assert same_bits(u, v)
    assert_same_state(duplicate.optimizer, optimizer)


UNPICKLE = """
import pickle, sys
import hvd_syncbn.keras
from hvd_syncbn.tf_impl.keras.training.optimizer import is_distributed
with open(sys.argv[1], "rb") as file:
    model, optimizer = pickle.load(file)
assert is_distributed(model.optimizer) and is_distributed(optimizer)
assert model.optimizer.momentum == optimizer.momentum == 0.25
"""


def test_pickles_cross_processes(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile(DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.25)), "mse")
    (tmp_path / "pickle").write_bytes(pickle.dumps((model, model.optimizer)))
    subprocess.run([sys.executable, "-c", UNPICKLE, str(tmp_path / "pickle")], check=True, timeout=200)


def test_model_checkpoint(tmp_path: Path) -> None:
    saved, loaded = make("sequential", "converted"), make("sequential", "plain", seed=2)
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "c.weights.h5", save_weights_only=True)
    saved.fit(X, X, verbose=0, callbacks=[checkpoint])
    loaded.load_weights(tmp_path / "c.weights.h5")
    assert_equal(loaded, Source(saved, saved(X).numpy(), {}))


def test_some_of_a_custom_class_and_its_settings(tmp_path: Path) -> None:
    """Just the layers that were synchronized are so again, with their process set; a mixture stays one."""
    model = make("custom", "plain")
    convert_sync_batchnorm(model.layers[1].body, process_set=[0])
    model.save(tmp_path / "model.keras")
    ours = load_model(tmp_path / "model.keras")
    assert kinds_of_norms(ours) == kinds_of_norms(model)
    assert sum(kinds_of_norms(ours)) == 2
    assert {x.process_set for x in norms(ours.layers[1].body)} == {(0,)}
    ours.fit(X, X, verbose=0)


def test_load_model_options(tmp_path: Path) -> None:
    model = make("sequential", "converted")
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
synchronized, reverted, x, y = sys.argv[1:]
try:
    keras.models.load_model(synchronized)
except TypeError as error:
    assert "hvd_syncbn>SyncBatchNormalization" in str(error), error
else:
    raise AssertionError("loaded")
np.save(y, keras.models.load_model(reverted)(np.load(x)))
"""


def test_where_hvd_syncbn_is_not_installed(tmp_path: Path) -> None:
    """After `revert_sync_batchnorm` it loads, with a distributed optimizer; else Keras's error names our package."""
    model = make("functional", "converted")
    model.compile(DistributedOptimizer(keras.optimizers.SGD()), "mse")
    np.save(tmp_path / "x.npy", X)
    arguments = [str(tmp_path / name) for name in ("synchronized.keras", "reverted.keras", "x.npy", "y.npy")]
    model.save(arguments[0])
    revert_sync_batchnorm(model).save(arguments[1])
    subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], check=True, timeout=200)
    assert same_bits(np.load(arguments[3]), model(X))


@pytest.mark.parametrize("wrong", [None, 3, [], keras.Sequential()])
def test_load_model_takes_paths(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"`filepath` must be a path. Received: "):
        load_model(wrong)


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, revert_sync_batchnorm])
def test_wrong_calls(convert: Any) -> None:
    model = keras.Sequential([Norm_()])
    for wrong in (None, [model], (model, model), {"a": model}, keras.Model, "model", 3, X, keras.Input((3,)), object()):
        with pytest.raises(TypeError, match=r"(?s)Keras 3.*Received: "):
            convert(wrong)
    tf_keras = pytest.importorskip("tf_keras")
    for wrong in (tf_keras.Sequential([tf_keras.layers.BatchNormalization()]), tf_keras.layers.BatchNormalization()):
        with pytest.raises(TypeError, match=r"tf_keras \(Keras 2\) is not supported. Received: .*tf_keras"):
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
