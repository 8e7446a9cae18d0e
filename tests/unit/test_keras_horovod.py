"""The Keras-Horovod glue in one process: what it does to an optimizer, its errors, and that nothing else changes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("horovod.tensorflow")

import h5py
import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from hvd_syncbn.keras import (
    BroadcastVariablesCallback,
    DistributedOptimizer,
    MetricAverageCallback,
)
from hvd_syncbn.tf_impl.keras.training.optimizer import is_distributed

pytestmark = pytest.mark.timeout(120)
LossScaleOptimizer = keras.mixed_precision.LossScaleOptimizer


@keras.saving.register_keras_serializable("test_keras_horovod")
class Halved(keras.optimizers.SGD):
    """An optimizer of a user's own."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient / 2, variable, learning_rate)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=0.5),
    "adamw": lambda: keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.1, 9), weight_decay=0.1, use_ema=True),
    "accumulating": lambda: keras.optimizers.Adam(0.1, gradient_accumulation_steps=2),
    "scaled": lambda: LossScaleOptimizer(keras.optimizers.RMSprop(0.01), initial_scale=4.0),
    "custom": lambda: Halved(0.1),
}
if hasattr(keras.optimizers, "MultiOptimizer"):  # newer than Keras 3.12
    OPTIMIZERS["several"] = lambda: keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {".*bias": keras.optimizers.Adam(0.01)})
    )


@pytest.fixture(autouse=True)
def horovod(monkeypatch: pytest.MonkeyPatch) -> None:
    """Horovod with one rank, and no collectives."""
    hvd.init()

    def unexpected(*args: object, **kwargs: object) -> None:
        raise AssertionError("a collective, with one rank")

    for name in ("allreduce", "grouped_allreduce", "grouped_allgather", "broadcast", "allgather_object"):
        monkeypatch.setattr(hvd, name, unexpected)


def make_model(optimizer: Any) -> Any:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)])
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    model.compile(optimizer=optimizer, loss="mse")
    return model


def fit(model: Any, epochs: int = 2, batch: int = 4, **kwargs: Any) -> Any:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(16, 4)), rng.normal(size=(16, 1))
    return model.fit(x, y, batch_size=batch, epochs=epochs, shuffle=False, verbose=0, **kwargs)


def state(model: Any) -> list[np.ndarray]:
    return [v.numpy() for v in [*model.weights, *model.optimizer.variables]]


def assert_same(model: Any, other: Any) -> None:
    for a, b in zip(state(model), state(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_is_the_wrapped_optimizer(make: Any) -> None:
    optimizer, plain = make(), make()
    distributed = DistributedOptimizer(optimizer)
    assert distributed is optimizer
    assert isinstance(distributed, type(plain))
    assert type(distributed).__name__ == type(plain).__name__
    assert plain.__class__ is not distributed.__class__ is type(distributed)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_file_holds_the_wrapped_optimizer(make: Any, tmp_path: Path) -> None:
    configs = []
    for optimizer in (DistributedOptimizer(make()), make()):
        make_model(optimizer).save(tmp_path / "model.keras")
        with zipfile.ZipFile(tmp_path / "model.keras") as file:
            configs.append(json.loads(file.read("config.json"))["compile_config"]["optimizer"])
    serialized, expected = configs
    assert serialized["config"].keys() == expected["config"].keys()  # not the values: Keras counts names
    assert serialized | {"config": None} == expected | {"config": None}
    make_model(DistributedOptimizer(make())).save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5") as file:
        config = json.loads(file.attrs["training_config"])["optimizer_config"]
    assert config["class_name"] == keras.saving.get_registered_name(type(make()))
    assert config["config"].keys() == expected["config"].keys()


COPIES = {
    "from_config": lambda optimizer: optimizer.from_config(optimizer.get_config()),
    "its class": lambda optimizer: optimizer.__class__.from_config(optimizer.get_config()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "serialize": lambda optimizer: keras.optimizers.deserialize(keras.optimizers.serialize(optimizer)),
    "clone_model": lambda optimizer: keras.models.clone_model(make_model(optimizer)).optimizer,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_copies_are_distributed(copied: Any, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings of the original and none of its state; what a LossScaleOptimizer is around is copied with it."""
    monkeypatch.setattr(hvd.global_process_set, "process_set_id", 0)
    options = {"process_set": hvd.global_process_set, "compression": hvd.Compression.fp16, "sparse_as_dense": True}
    optimizer = DistributedOptimizer(make(), "mine", backward_passes_per_step=2, **options)
    both = [optimizer] if isinstance(optimizer, LossScaleOptimizer) else [optimizer, LossScaleOptimizer(optimizer)]
    for original in both:
        duplicate = copied(original)
        assert isinstance(duplicate, type(make()) if original is optimizer else LossScaleOptimizer)
        assert is_distributed(duplicate)
        a, b = ((x if original is optimizer else x.inner_optimizer)._averager for x in (original, duplicate))
        assert a is not b
        assert a.get_config() == b.get_config()
        assert b.compression is hvd.Compression.fp16
        assert b.accumulators is not a.accumulators


def test_copies_have_accumulators_of_their_own() -> None:
    """The issue's example: applied in turn, each updates by its own gradients."""
    g = DistributedOptimizer(keras.optimizers.SGD(1.0), backward_passes_per_step=2)
    for d in (g.from_config(g.get_config()), copy.deepcopy(g), pickle.loads(pickle.dumps(g))):
        first, second = keras.Variable(0.0), keras.Variable(0.0)
        g = g.from_config(g.get_config())
        for _ in range(2):
            g.apply([tf.constant(1.0)], [first])
            d.apply([tf.constant(100.0)], [second])
        assert (float(first), float(second)) == (-1.0, -100.0)


def test_names_of_collectives() -> None:
    """Optimizers are counted when they first have something to exchange, not when they are made."""
    a, b, c = (DistributedOptimizer(keras.optimizers.SGD(), "test.names") for _ in range(3))
    d = copy.deepcopy(a)
    assert [x._averager.prefix for x in (c, d, c, a)] == ["test.names", "test.names.1", "test.names", "test.names.2"]
    assert b._averager.name == "test.names"


def test_keras_own_loss_scale_optimizer_is_left_alone() -> None:
    assert LossScaleOptimizer.check_finite.__module__.startswith("keras.")
    assert type(LossScaleOptimizer(keras.optimizers.SGD())) is LossScaleOptimizer
    around = LossScaleOptimizer(DistributedOptimizer(keras.optimizers.SGD()))
    assert type(around) is not LossScaleOptimizer
    assert around.__class__ is LossScaleOptimizer
    inner = keras.optimizers.SGD()
    around = LossScaleOptimizer(inner)
    DistributedOptimizer(inner)
    with pytest.raises(RuntimeError, match=r"DistributedOptimizer\(loss_scale_optimizer\).*Received: "):
        around.apply([tf.constant(1.0)], [keras.Variable(0.0)])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_one_rank_trains_as_without(make: Any) -> None:
    plain, distributed = make_model(make()), make_model(DistributedOptimizer(make()))
    fit(plain)
    fit(distributed, callbacks=[BroadcastVariablesCallback(), MetricAverageCallback()])
    assert_same(plain, distributed)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_save_load_wrap_and_continue(make: Any, tmp_path: Path) -> None:
    def interrupted(wrap: Any) -> Any:
        model = make_model(wrap(make()))
        fit(model, epochs=2)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert type(loaded.optimizer) is type(make())
        assert_same(loaded, model)
        wrap(loaded.optimizer)
        fit(loaded, epochs=4, initial_epoch=2)
        return loaded

    assert_same(interrupted(DistributedOptimizer), interrupted(lambda optimizer: optimizer))


def test_wrapped_after_training() -> None:
    """The step that was traced with the plain optimizer is not used again."""
    model = make_model(keras.optimizers.SGD(0.01))
    fit(model, epochs=1)
    steps = int(model.optimizer.iterations)
    DistributedOptimizer(model.optimizer, backward_passes_per_step=2)
    fit(model, epochs=2, callbacks=[BroadcastVariablesCallback()])
    assert int(model.optimizer.iterations) == 2 * steps  # as many for twice the epochs: half as many steps each


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "tf.function"])
def test_backward_passes_per_step(compiled: bool) -> None:
    """Two batches, one update with their mean gradient, also with a gradient missing and in a loop of one's own."""
    used, unused = keras.Variable([1.0, 2.0]), keras.Variable([3.0])
    optimizer = DistributedOptimizer(keras.optimizers.SGD(1.0), backward_passes_per_step=2)

    def step(gradient: Any) -> None:
        optimizer.apply([gradient, None], [used, unused])

    run = tf.function(step) if compiled else step
    seen = []
    for value in (1.0, 3.0, 0.0, 4.0, 5.0):
        run(tf.constant([value, 0.0]))
        seen.append(float(used.numpy()[0]))
    assert seen == [1.0, -1.0, -1.0, -3.0, -3.0]
    assert int(optimizer.iterations) == 2
    assert unused.numpy() == 3.0


def test_backward_passes_equal_a_larger_batch() -> None:
    def make() -> Any:
        rate = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
        return LossScaleOptimizer(keras.optimizers.Adam(rate, use_ema=True), initial_scale=8.0)

    larger, smaller = make_model(make()), make_model(DistributedOptimizer(make(), backward_passes_per_step=2))
    fit(larger, batch=8)
    fit(smaller, batch=4)
    assert int(smaller.optimizer.iterations) == int(larger.optimizer.iterations) == 4
    for a, b in zip(state(smaller), state(larger), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # float32: the mean of two means


def test_broadcast_builds_the_model_before_the_first_step() -> None:
    """For several inputs, and leaves the batch size open: the last batch is smaller."""

    class Sum(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, inputs: dict[str, Any]) -> Any:
            return self.dense(inputs["a"]) + self.dense(inputs["b"])

    order = []

    class Observed(BroadcastVariablesCallback):
        def _broadcast(self) -> None:
            super()._broadcast()
            order.append((len(self.model.weights), len(self.model.optimizer.variables)))

    model = Sum()
    model.compile(optimizer=DistributedOptimizer(keras.optimizers.SGD(momentum=0.9)), loss="mse")
    data = {"a": np.ones((5, 3)), "b": np.ones((5, 3))}
    model.fit(data, np.ones((5, 1)), batch_size=2, verbose=0, callbacks=[Observed()])
    model.fit(data, np.ones((5, 1)), batch_size=2, verbose=0, callbacks=[Observed()])
    assert order == [(2, 4), (2, 4)]
    assert int(model.optimizer.iterations) == 6


def test_elastic_job_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced with one rank has to serve more of them later."""
    optimizer = DistributedOptimizer(keras.optimizers.SGD())
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    with pytest.raises(AssertionError, match="a collective"):
        optimizer.apply([tf.ones(1)], [keras.Variable([0.0])])


def test_metrics_keep_their_kind() -> None:
    logs: dict[str, Any] = {"loss": np.float32(0.5), "by_class": np.array([1.0, 2.0])}
    MetricAverageCallback().on_epoch_end(0, logs)
    assert type(logs["loss"]) is float
    np.testing.assert_array_equal(logs["by_class"], [1.0, 2.0])


@pytest.mark.parametrize("optimizer", ["adam", None, keras.optimizers.SGD, object()])
def test_not_an_optimizer(optimizer: Any) -> None:
    with pytest.raises(TypeError, match="Received: "):
        DistributedOptimizer(optimizer)


def test_distributed_already() -> None:
    inner = DistributedOptimizer(keras.optimizers.SGD())
    for optimizer in (inner, LossScaleOptimizer(inner)):
        with pytest.raises(ValueError, match=r"already a DistributedOptimizer. Received: "):
            DistributedOptimizer(optimizer)


@pytest.mark.parametrize("passes", [0, -1, 1.5, None])
def test_bad_backward_passes_per_step(passes: Any) -> None:
    with pytest.raises(ValueError, match=f"Received: backward_passes_per_step={passes}"):
        DistributedOptimizer(keras.optimizers.SGD(), backward_passes_per_step=passes)


def test_not_initialized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hvd, "is_initialized", lambda: False)
    for use in (
        lambda: DistributedOptimizer(keras.optimizers.SGD()),
        lambda: MetricAverageCallback().on_epoch_end(0, {}),
        lambda: fit(make_model("sgd"), callbacks=[BroadcastVariablesCallback()]),
    ):
        with pytest.raises(RuntimeError, match=r"init\(\)"):
            use()


OTHER_BACKEND = """
import sys
import keras
from hvd_syncbn.keras import DistributedOptimizer
try:
    DistributedOptimizer(keras.optimizers.SGD())
except RuntimeError as error:
    assert str(error).endswith("Received: KERAS_BACKEND=torch"), error
else:
    raise AssertionError("accepted")
assert not any(name.startswith("horovod") for name in sys.modules)
"""


def test_other_backend() -> None:
    pytest.importorskip("torch")
    env = os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", OTHER_BACKEND], env=env, check=True, timeout=110)
