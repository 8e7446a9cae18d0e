"""State of layers, several optimizers, and backups in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("horovod.tensorflow")

import horovod.tensorflow as horovod
import keras

import hvd_syncbn.keras as hvd
from hvd_syncbn.tf_impl.keras import layer_state
from hvd_syncbn.tf_impl.keras.training.optimizer import is_distributed, is_new, optimizers_of
from tests.keras_gan import Gan, Sides, built_gan

pytestmark = pytest.mark.timeout(180)
X = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Horovod with one rank, and no collectives."""
    horovod.init()

    def unexpected(*args: object, **kwargs: object) -> None:
        raise AssertionError("a collective, with one rank")

    for name in ("allreduce", "grouped_allreduce", "broadcast", "allgather_object", "broadcast_object"):
        monkeypatch.setattr(horovod, name, unexpected)


def normalizing_model() -> keras.Model:
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Normalization(), keras.layers.Dense(1, kernel_initializer="ones")]
    )
    model.layers[0].adapt(X)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), "mse")
    return model


def seen_by(model: keras.Model, **kwargs: Any) -> list[float]:
    loss = model.fit(X, X[:, :1], batch_size=8, shuffle=False, verbose=0, **kwargs).history["loss"]
    return [*loss, *model.predict(X, verbose=0).ravel().tolist()]


def test_restored_constants_reach_a_traced_step() -> None:
    model = normalizing_model()
    expected = seen_by(model)
    state = hvd.elastic.KerasState(model)
    model.layers[0].adapt(X * 5)
    state.restore()
    assert seen_by(model) == expected


def test_a_step_that_was_traced_uses_new_constants() -> None:
    """As on several ranks: also where nothing is broadcast."""
    model = normalizing_model()
    before = seen_by(model)
    model.layers[0].adapt(X * 5)
    after = seen_by(model, callbacks=[hvd.callbacks.BroadcastVariablesCallback()])
    assert after != before
    model.compile(keras.optimizers.SGD(0.0), "mse")
    assert after == seen_by(model)


def test_a_vocabulary_is_restored() -> None:
    lookup: Any = keras.layers.StringLookup(vocabulary=["a", "b"])
    numbers: Any = keras.layers.Discretization(num_bins=2)
    numbers.adapt(X)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    state = hvd.elastic.KerasState(model, keras.optimizers.SGD(), lookup=lookup, bins=numbers)
    kept = lookup.get_vocabulary(), list(numbers.bin_boundaries)
    lookup.set_vocabulary(["c"])
    numbers.adapt(X * 3)
    assert (lookup.get_vocabulary(), list(numbers.bin_boundaries)) != kept
    state.restore()
    assert (lookup.get_vocabulary(), list(numbers.bin_boundaries)) == kept


def test_exported_once() -> None:
    """A commit does not copy a vocabulary that did not change."""
    lookup: Any = keras.layers.StringLookup(vocabulary=["a", "b"])
    layers = layer_state.all_layers([lookup])
    first, second = (layer_state.capture(layers)[0][1]["vocabulary"] for _ in range(2))
    assert first is second == ["[UNK]", "a", "b"]


def test_optimizers_of_a_model() -> None:
    class Outer(keras.Model):
        pass

    inner, outer = built_gan(0, lambda one: one), Outer()
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(name="scaled"))
    outer.compile(scaled, "mse")
    outer.gan, outer.again, outer.listed = inner, scaled.inner_optimizer, [keras.optimizers.Adam()]
    found = optimizers_of(outer)
    assert found[0] is scaled and outer.listed[0] in found and len(found) == 5
    assert {id(inner.optimizer), id(inner.d_optimizer), id(inner.sides.optimizers["g"])} < {id(one) for one in found}


def gan_values(gan: Gan) -> list[bytes]:
    optimizers = (gan.d_optimizer, gan.sides.optimizers["g"])
    return [v.numpy().tobytes() for v in [*gan.weights, *(v for one in optimizers for v in one.variables)]]


def test_every_optimizer_is_restored() -> None:
    gan = built_gan(0, hvd.DistributedOptimizer)
    gan.fit(X, batch_size=4, verbose=0)
    state = hvd.elastic.KerasState(gan)
    kept = gan_values(gan)
    gan.fit(X, batch_size=4, verbose=0)
    assert gan_values(gan) != kept
    state.restore()
    assert gan_values(gan) == kept


def test_a_state_refuses_what_it_cannot_keep() -> None:
    gan = built_gan(0, hvd.DistributedOptimizer, build=False)
    optimizers = [gan.d_optimizer, gan.optimizer]
    with pytest.raises(ValueError, match=r"model.d_optimizer.build\(variables\)"):
        hvd.elastic.KerasState(gan)
    for given, kwargs in ((gan, {"optimizer": optimizers}), ([gan, gan], {}), (gan, {"others": {"a": optimizers[0]}})):
        with pytest.raises(TypeError, match=r"separate keyword argument.*Received: (optimizer|model|others)="):
            hvd.elastic.KerasState(given, **kwargs)
    with pytest.raises(TypeError, match="a single Keras 3 model"):
        hvd.elastic.KerasState("model")
    gan.d_optimizer.build(gan.sides.discriminator.trainable_variables)
    with pytest.raises(ValueError, match=r"'late' must be built first"):
        hvd.elastic.KerasState(gan, late=keras.optimizers.SGD())


def test_load_model_wraps_every_optimizer(tmp_path: Path) -> None:
    gan = built_gan(0, lambda one: one)
    gan.save(tmp_path / "gan.keras")
    loaded = hvd.load_model(tmp_path / "gan.keras", custom_objects={"Gan": Gan, "Sides": Sides})
    assert [is_distributed(one) for one in (loaded.optimizer, loaded.d_optimizer, loaded.sides.optimizers["g"])] == [True] * 3


def test_several_optimizers_in_one() -> None:
    def several(*optimizers: Any) -> Any:
        return keras.optimizers.MultiOptimizer(lambda v: optimizers["bias" in v.path])

    for wrapped in (True, False):
        pair = [keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1)]
        pair = [hvd.DistributedOptimizer(pair[0]), hvd.DistributedOptimizer(pair[1]) if wrapped else pair[1]]
        optimizer = several(*pair)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(optimizer, "mse")
        optimizer.build(model.trainable_variables)
        assert is_distributed(optimizer) == wrapped and is_new(optimizer)
        model.fit(X, X[:, :1], verbose=0)
        assert not is_new(optimizer)
        with pytest.raises(ValueError, match="already"):
            hvd.DistributedOptimizer(optimizer)


class Stopped(Exception):
    pass


def epochs(callback: Any, stop_at: int | None, initial: int = 0) -> list[int]:
    """The epochs that a training sees, which may end with an exception."""
    seen: list[int] = []

    def begin(epoch: int, logs: Any) -> None:
        seen.append(epoch)
        if epoch == stop_at:
            raise Stopped

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    callbacks = [callback, keras.callbacks.LambdaCallback(on_epoch_begin=begin)]
    try:
        model.fit(X, X[:, :1], batch_size=2, epochs=5, initial_epoch=initial, verbose=0, callbacks=callbacks)
    except Stopped:
        assert stop_at is not None
    return seen


@pytest.mark.parametrize("save_freq", ["epoch", 3])
@pytest.mark.parametrize("initial", [0, 2])
def test_backup_resumes_as_keras_does(save_freq: Any, initial: int, tmp_path: Path) -> None:
    seen = []
    for cls in (keras.callbacks.BackupAndRestore, hvd.callbacks.BackupAndRestore):
        folder = tmp_path / cls.__module__
        epochs(cls(folder, save_freq), 3, initial)
        assert sorted(path.name for path in folder.iterdir()) == ["latest.weights.h5", "training_metadata.json"]
        metadata = json.loads((folder / "training_metadata.json").read_text())
        seen.append((metadata["epoch"], epochs(cls(folder, save_freq), None, initial)))
        assert not folder.exists()
    if save_freq == "epoch":
        assert seen[0] == seen[1] == (3, [3, 4])
    else:  # Keras writes the number of finished epochs, which is 0 before the first one ends
        assert seen[1] == (2, [2, 3, 4])


def test_backup_knows_the_epoch_that_training_began_with(tmp_path: Path) -> None:
    class StopInBatch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch == 3:
                raise Stopped

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    callbacks = [hvd.callbacks.BackupAndRestore(tmp_path / "b", 2), StopInBatch()]
    with pytest.raises(Stopped):
        model.fit(X, X[:, :1], batch_size=2, epochs=5, initial_epoch=2, verbose=0, callbacks=callbacks)
    assert json.loads((tmp_path / "b" / "training_metadata.json").read_text()) == {"epoch": 2, "batch": 1}


def test_a_backup_that_is_cut_short_is_not_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it writes: the backup before stays."""
    folder = tmp_path / "b"
    epochs(hvd.callbacks.BackupAndRestore(folder), 2)
    before = (folder / "latest.weights.h5").read_bytes()

    def cut(self: Any, path: Any, **kwargs: Any) -> None:
        Path(path).write_bytes(b"cut short")
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(keras.Model, "save_weights", cut)
        epochs(hvd.callbacks.BackupAndRestore(folder), 4)
    assert (folder / "latest.weights.h5").read_bytes() == before
    assert epochs(hvd.callbacks.BackupAndRestore(folder), None) == [2, 3, 4]
