"""What the Keras-Horovod glue promises, checked by all ranks of one job together.

Most models are float64. There, all that distinguishes ranks with a part of the batch from one process with all of it is
the order of a sum: 1e-16 of a gradient. Adam may amplify that by 1 / epsilon = 1e7 where a gradient is nearly zero,
hence a tolerance of 1e-9, at which every real mistake (a forgotten factor, a skipped step) is seen. The one
process runs eagerly: sooner done.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from hvd_syncbn.keras import (
    BroadcastVariablesCallback,
    DistributedOptimizer,
    MetricAverageCallback,
    convert_sync_batchnorm,
    load_model,
)

TOLERANCE = 1e-9
MSE = keras.losses.MeanSquaredError(dtype="float64")  # by default it would compute in float32
STEPS, BATCH, FEATURES = 4, 6, 5  # BATCH is per rank


def all_equal(value: object) -> bool:
    values = hvd.allgather_object(value)
    return all(other == values[0] for other in values)


def digest(model: keras.Model) -> str:
    variables = [v.value.numpy() for v in [*model.weights, *model.optimizer.variables]]
    return hashlib.sha256(b"".join(np.ascontiguousarray(v).tobytes() for v in variables)).hexdigest()


def make_model(seed: int = 7, dtype: str | None = "float64") -> keras.Model:
    layers = [keras.layers.Dense(units, activation, dtype=dtype) for units, activation in ((8, "tanh"), (1, None))]
    model = keras.Sequential([keras.Input((FEATURES,)), *layers])
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(size=w.shape) * 0.5 for w in model.get_weights()])
    return model


def make_data(steps: int = STEPS, batch: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    """Return the global data, arranged as (steps, ranks, batch, ...)."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(steps, hvd.size(), batch, FEATURES)).astype("float32")  # `fit()` would do so
    return x, np.sin(x.sum(-1, keepdims=True))


def flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1])


def fit(model: keras.Model, x: np.ndarray, y: np.ndarray, batch: int, epochs: int = 2, **kwargs: Any) -> Any:
    return model.fit(flat(x), flat(y), batch_size=batch, epochs=epochs, shuffle=False, verbose=0, **kwargs)


def fit_here_and_alone(optimizer: keras.optimizers.Optimizer, **options: Any) -> tuple[keras.Model, keras.Model]:
    """Train by this rank's part with the distributed optimizer, and with all the data and the plain one."""
    x, y = make_data()
    alone = make_model()
    alone.compile(optimizer=type(optimizer).from_config(optimizer.get_config()), loss=MSE, run_eagerly=True)
    passes = options.get("backward_passes_per_step", 1)
    fit(alone, x, y, BATCH * hvd.size() * passes)
    here = make_model()
    here.compile(optimizer=DistributedOptimizer(optimizer, **options), loss=MSE)
    fit(here, x[:, hvd.rank()], y[:, hvd.rank()], BATCH)
    return here, alone


def assert_close(here: keras.Model, there: keras.Model, tolerance: float = TOLERANCE) -> None:
    for a, b in zip(here.get_weights(), there.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    assert all_equal(digest(here))


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder that rank 0 makes and removes when all are done."""
    with tempfile.TemporaryDirectory() if hvd.rank() == 0 else contextlib.nullcontext() as path:
        yield Path(hvd.broadcast_object(path))
        hvd.allgather_object(None)


def check_fit_equals_one_process() -> None:
    rates = keras.optimizers.schedules.ExponentialDecay(0.05, 3, 0.9)
    for optimizer in (
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.optimizers.AdamW(rates, weight_decay=0.01, use_ema=True, ema_overwrite_frequency=3),
        keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {".*bias": keras.optimizers.Adam(0.01)})
        ),
    ):
        assert_close(*fit_here_and_alone(optimizer))


def check_fit_float32() -> None:
    # Rounding of 1e-7 per step, over 8 steps, on weights of about 1.
    x, y = make_data()
    alone, here = make_model(dtype="float32"), make_model(dtype="float32")
    alone.compile(optimizer=keras.optimizers.SGD(0.1), loss=MSE, run_eagerly=True)
    fit(alone, x, y, BATCH * hvd.size())
    here.compile(optimizer=DistributedOptimizer(keras.optimizers.SGD(0.1)), loss=MSE)
    fit(here, x[:, hvd.rank()], y[:, hvd.rank()], BATCH)
    assert_close(here, alone, 1e-5)


def check_clipping_after_averaging() -> None:
    for clip in ({"clipnorm": 0.01}, {"global_clipnorm": 0.01}, {"clipvalue": 0.001}):
        # The limit is far below the gradients, so that clipping before averaging gives something else.
        assert_close(*fit_here_and_alone(keras.optimizers.SGD(1.0, **clip)))


def check_backward_passes_per_step() -> None:
    """Two batches per update are one of double size, also for what counts steps: schedules, EMA, Adam's bias."""
    x, y = make_data()
    for make in (
        lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.05, 1, 0.9), global_clipnorm=0.1),
        lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5),
    ):
        for eagerly in (False, True):
            alone, here = make_model(), make_model()
            alone.compile(optimizer=make(), loss=MSE, run_eagerly=True)
            fit(alone, x, y, 2 * BATCH * hvd.size())
            here.compile(optimizer=DistributedOptimizer(make(), backward_passes_per_step=2), loss=MSE)
            here.run_eagerly = eagerly
            fit(here, x[:, hvd.rank()], y[:, hvd.rank()], BATCH)
            assert int(here.optimizer.iterations) == int(alone.optimizer.iterations) == STEPS
            assert_close(here, alone)


def check_steps_per_execution() -> None:
    x, y = make_data()
    here, alone = make_model(), make_model()
    alone.compile(optimizer=keras.optimizers.SGD(0.1), loss=MSE, run_eagerly=True)
    fit(alone, x, y, BATCH * hvd.size())
    here.compile(optimizer=DistributedOptimizer(keras.optimizers.SGD(0.1)), loss=MSE, steps_per_execution=2)
    fit(here, x[:, hvd.rank()], y[:, hvd.rank()], BATCH)
    assert_close(here, alone)


def check_sparse_gradients() -> None:
    """Two embeddings and a dense layer: slices of different shapes among dense gradients, rows in common and not."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 20, (STEPS, hvd.size(), BATCH, 3))
    y = rng.normal(size=(STEPS, hvd.size(), BATCH, 1))

    def make() -> keras.Model:
        inputs = keras.Input((3,), dtype="int32")
        parts = [keras.layers.Embedding(rows, 4, dtype="float64")(inputs) for rows in (20, 30)]
        hidden = keras.layers.Flatten(dtype="float64")(keras.layers.Concatenate(dtype="float64")(parts))
        model = keras.Model(inputs, keras.layers.Dense(1, dtype="float64")(hidden))
        weights = np.random.default_rng(6)
        model.set_weights([weights.normal(size=w.shape) for w in model.get_weights()])
        return model

    model = make()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(tokens[0, 0]))
    gradients = tape.gradient(loss, model.trainable_variables)
    assert sum(isinstance(g, tf.IndexedSlices) for g in gradients) == 2

    sgd = functools.partial(keras.optimizers.SGD, 0.1, momentum=0.9)
    # Keras clips, and squares for Adam, the slices of one row before it adds them up: equal to one process as long as
    # ours stay apart, too, so not where they become dense.
    for make_optimizer, options in (
        (sgd, {}),
        (functools.partial(keras.optimizers.Adam, 0.01, clipnorm=0.1), {}),
        (sgd, {"sparse_as_dense": True}),
        (sgd, {"backward_passes_per_step": 2}),
    ):
        here, alone = make(), make()
        alone.compile(optimizer=make_optimizer(), loss=MSE, run_eagerly=True)
        fit(alone, tokens, y, BATCH * hvd.size() * options.get("backward_passes_per_step", 1))
        here.compile(optimizer=DistributedOptimizer(make_optimizer(), **options), loss=MSE)
        fit(here, tokens[:, hvd.rank()], y[:, hvd.rank()], BATCH)
        assert_close(here, alone)


def check_dtypes() -> None:
    """Gradients of several dtypes, bfloat16 among them, and a variable without one."""
    dtypes = ("float32", "bfloat16", "float16", "float64", "bfloat16")
    variables = [keras.Variable(np.zeros(3), dtype=dtype) for dtype in dtypes]
    optimizer = DistributedOptimizer(keras.optimizers.SGD(1.0))
    unused = keras.Variable(np.zeros(3))
    gradients = [tf.fill([3], tf.cast(hvd.rank() * 2 + i, v.dtype)) for i, v in enumerate(variables)]
    optimizer.apply_gradients([*zip(gradients, variables, strict=True), (None, unused)])
    for i, v in enumerate(variables):
        np.testing.assert_array_equal(v.value.numpy().astype("float64"), -(hvd.size() - 1.0 + i))
        assert v.value.dtype == dtypes[i]
    assert not unused.numpy().any()


def check_compression() -> None:
    variable = keras.Variable(np.zeros(2), dtype="float32")
    optimizer = DistributedOptimizer(keras.optimizers.SGD(1.0), compression=hvd.Compression.fp16)
    optimizer.apply([tf.constant([1.0 + 2.0**-12, hvd.rank()])], [variable])
    np.testing.assert_array_equal(variable.numpy(), [-1.0, -(hvd.size() - 1) / 2])


def overflow_once(optimizer: keras.optimizers.Optimizer, eagerly: bool) -> list[float]:
    """Three steps; in the second, the gradient overflows on the last rank only. Return the variable after each."""
    variable = keras.Variable(np.zeros(1), dtype="float32")

    def step(poison: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(tf.reduce_sum(variable * (poison + tf.cast(hvd.rank(), tf.float32))))
        optimizer.apply(tape.gradient(loss, [variable]), [variable])

    run = step if eagerly else tf.function(step)
    values = []
    for poison in (1.0, np.inf if hvd.rank() == hvd.size() - 1 else 1.0, 1.0):
        run(tf.constant(poison, tf.float32))
        values.append(float(variable.numpy()[0]))
    return values


def check_loss_scaling() -> None:
    """An overflow on one rank skips the step and halves the scale on all of them, whoever wraps whom."""
    scale = functools.partial(keras.mixed_precision.LossScaleOptimizer, initial_scale=8.0)
    mean = (hvd.size() + 1) / 2
    for eagerly in (True, False):
        for passes in (1, 2):
            for optimizer in (
                DistributedOptimizer(scale(keras.optimizers.SGD(1.0)), backward_passes_per_step=passes),
                scale(DistributedOptimizer(keras.optimizers.SGD(1.0), backward_passes_per_step=passes)),
            ):
                values = overflow_once(optimizer, eagerly)
                outside = optimizer.__class__ is keras.mixed_precision.LossScaleOptimizer
                # Inside, the sum of two batches overflows; outside, the batch that does is left out of it.
                expected = [-mean, -mean, -2 * mean] if passes == 1 else [0.0, 0.0, -mean if outside else 0.0]
                assert values == expected, (values, expected)
                assert float(optimizer.dynamic_scale.numpy()) == 4.0


def check_mixed_float16_fit() -> None:
    """`compile()` wraps the distributed optimizer into a LossScaleOptimizer by itself."""
    x, y = make_data()
    if hvd.rank() == 0:
        y[1] = 1e30  # infinite in float16: on one rank, one step
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make_model(dtype=None)
        model.compile(optimizer=DistributedOptimizer(keras.optimizers.SGD(0.01)), loss=MSE)
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras.mixed_precision.LossScaleOptimizer)
    fit(model, x[:, hvd.rank()], y[:, hvd.rank()], BATCH, epochs=1)
    assert int(model.optimizer.iterations) == STEPS - 1
    assert float(model.optimizer.dynamic_scale.numpy()) == 2.0**14
    assert all_equal(digest(model))


def check_process_sets() -> None:
    """Rank 0 alone and all the others: two trainings in one job (HOROVOD_DYNAMIC_PROCESS_SETS=1)."""
    groups = [[0], list(range(1, hvd.size()))]
    sets = [hvd.add_process_set(ranks) for ranks in groups]
    mine = int(hvd.rank() > 0)
    x, y = make_data()
    here, alone = make_model(seed=hvd.rank()), make_model(seed=groups[mine][0])
    alone.compile(optimizer=keras.optimizers.SGD(0.1), loss=MSE, run_eagerly=True)
    fit(alone, x[:, groups[mine]], y[:, groups[mine]], BATCH * len(groups[mine]))
    here.compile(optimizer=DistributedOptimizer(keras.optimizers.SGD(0.1), process_set=sets[mine]), loss=MSE)
    callbacks = [BroadcastVariablesCallback(groups[mine][0], sets[mine]), MetricAverageCallback(sets[mine])]
    history = fit(here, x[:, hvd.rank()], y[:, hvd.rank()], BATCH, callbacks=callbacks)
    for a, b in zip(here.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    everyone = hvd.allgather_object((digest(here), history.history["loss"]))
    assert all(other == everyone[ranks[0]] for ranks in groups for other in (everyone[r] for r in ranks))
    assert everyone[0] != everyone[1]

    try:
        DistributedOptimizer(keras.optimizers.SGD(0.1), process_set=sets[1 - mine])
    except ValueError as error:
        assert "Received: " in str(error), error
    else:
        raise AssertionError("a process set without this rank was accepted")
    hvd.allgather_object(None)
    for process_set in sets:
        hvd.remove_process_set(process_set)


def check_broadcast() -> None:
    """Variables of every kind, of model and optimizer, before the first step; again when trained again."""

    def rank_parity(shape: tuple[int, ...], dtype: str) -> tf.Tensor:
        return tf.cast(tf.fill(shape, hvd.rank() % 2), dtype)

    class Odd(keras.layers.Layer):
        def build(self, input_shape: tuple[int, ...]) -> None:
            for dtype in ("int8", "uint8", "int32", "int64", "uint32", "bool", "bfloat16", "float16", "float64"):
                self.add_weight(shape=(2,), dtype=dtype, trainable=False, initializer=rank_parity)
            self.scale = self.add_weight(shape=(), initializer="zeros")

        def call(self, x: tf.Tensor) -> tf.Tensor:
            return x + self.scale

    keras.utils.set_random_seed(hvd.rank())
    dropout = keras.layers.Dropout(0.5)
    model = keras.Sequential([keras.layers.Dense(4), keras.layers.BatchNormalization(), dropout, Odd()])
    model.compile(optimizer=DistributedOptimizer(keras.optimizers.Adam(0.1 + hvd.rank())), loss=MSE)
    seen: list[tuple[int, str]] = []

    class Observed(BroadcastVariablesCallback):
        def _broadcast(self) -> None:
            super()._broadcast()
            seen.append((int(model.optimizer.iterations), digest(model)))

    x, y = make_data(steps=1)
    mine = x[:, hvd.rank()], y[:, hvd.rank()]
    assert not model.built
    fit(model, *mine, BATCH, epochs=1, callbacks=[Observed(1)])
    assert len(model.weights) == 16
    assert not all_equal(digest(model)), "the moving statistics are each rank's own"
    fit(model, *mine, BATCH, epochs=1, callbacks=[Observed(1)])
    assert [iterations for iterations, _ in seen] == [0, 1]
    assert all_equal(seen)
    np.testing.assert_allclose(float(model.optimizer.learning_rate.numpy()), 1.1, rtol=1e-6)
    assert not all_equal(dropout.seed_generator.state.numpy().tobytes()), "equal seeds drop the same units everywhere"


def check_models_that_data_builds() -> None:
    """They start from the weights of rank 0, too: equal to one process from the first step on."""

    class Subclassed(keras.Model):
        def __init__(self, layers: list[keras.layers.Layer]) -> None:
            super().__init__()
            self.stack = layers

        def call(self, x: tf.Tensor) -> tf.Tensor:
            for layer in self.stack:
                x = layer(x)
            return x

    def layers(seed: int) -> list[keras.layers.Layer]:
        kernel = keras.initializers.GlorotUniform(seed)
        return [keras.layers.Dense(n, kernel_initializer=kernel, dtype="float64") for n in (3, 1)]

    x, y = make_data()
    for kind in (keras.Sequential, Subclassed):
        alone, here = kind(layers(0)), kind(layers(hvd.rank()))
        alone.compile(optimizer=keras.optimizers.Adam(0.01), loss=MSE, run_eagerly=True)
        fit(alone, x, y, BATCH * hvd.size())
        here.compile(optimizer=DistributedOptimizer(keras.optimizers.Adam(0.01)), loss=MSE)
        fit(here, x[:, hvd.rank()], y[:, hvd.rank()], BATCH, callbacks=[BroadcastVariablesCallback()])
        assert_close(here, alone)


def check_broadcast_of_different_models() -> None:
    model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(1 + hvd.rank())])
    model.compile(optimizer=DistributedOptimizer(keras.optimizers.SGD()), loss=MSE)
    try:
        model.fit(np.zeros((2, FEATURES)), np.zeros((2, 1)), verbose=0, callbacks=[BroadcastVariablesCallback()])
    except ValueError as error:
        assert "same variables on all ranks" in str(error), error
    else:
        raise AssertionError("different models were accepted")


def check_metric_average() -> None:
    logs = {"loss": float(hvd.rank()), "accuracy": np.float32(1.0)}
    MetricAverageCallback().on_epoch_end(0, logs)
    assert logs == {"loss": (hvd.size() - 1) / 2, "accuracy": 1.0}
    MetricAverageCallback().on_epoch_end(0, None)
    for different in ({"loss": 1.0, f"metric{hvd.rank()}": 1.0}, {} if hvd.rank() == 0 else {"loss": 1.0}):
        try:
            MetricAverageCallback().on_epoch_end(0, different)
        except ValueError as error:
            assert "same metrics" in str(error), error
        else:
            raise AssertionError("different metrics were accepted")


def check_fit_with_callbacks() -> None:
    """The whole of it: all ranks decide alike, though each has validation data of its own."""
    x, y = make_data()
    rng = np.random.default_rng(hvd.rank())
    own_x, own_y = rng.normal(size=(4, FEATURES)), rng.normal(size=(4, 1)) * (1 + hvd.rank())
    with shared_folder() as folder:
        best = folder / f"best{hvd.rank()}.keras"
        model = make_model(seed=hvd.rank())
        model.compile(optimizer=DistributedOptimizer(keras.optimizers.Adam(0.1)), loss=MSE, metrics=["mae"])
        callbacks = [
            BroadcastVariablesCallback(),
            MetricAverageCallback(),
            keras.callbacks.ReduceLROnPlateau(monitor="val_loss", patience=1),
            keras.callbacks.EarlyStopping(monitor="val_loss", patience=3, restore_best_weights=True),
            keras.callbacks.ModelCheckpoint(best, monitor="val_loss", save_best_only=True),
        ]
        mine = x[:, hvd.rank()], y[:, hvd.rank()]
        history = fit(model, *mine, BATCH, 40, callbacks=callbacks, validation_data=(own_x, own_y))
        assert 3 < len(history.epoch) < 40, "this is to stop early"
        assert all_equal(history.history)
        assert all_equal(digest(model))
        restored = keras.models.load_model(best)
        for a, b in zip(restored.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


LOAD_ELSEWHERE = """
import sys
sys.modules["horovod"] = None
import keras
model = keras.models.load_model(sys.argv[1])
assert not any(name.split(".")[0] in ("hvd_syncbn", "tf_impl") for name in sys.modules)
assert type(model.optimizer) is keras.optimizers.Adam, type(model.optimizer)
assert int(model.optimizer.iterations) == int(sys.argv[2])
assert any(v.numpy().any() for v in model.optimizer.variables[2:])
"""


def check_save_load_resume() -> None:
    """Two epochs, a file, two more: the same bytes as four epochs; and the file is a plain Keras model."""
    x, y = make_data()
    mine = x[:, hvd.rank()], y[:, hvd.rank()]
    for options in ({}, {"backward_passes_per_step": 2}):
        through, first = make_model(), make_model()
        for model, epochs in ((through, 4), (first, 2)):
            optimizer = DistributedOptimizer(keras.optimizers.Adam(0.01, clipnorm=1.0), **options)
            model.compile(optimizer=optimizer, loss="mse")  # Keras forgets the dtype of a loss it saves
            fit(model, *mine, BATCH, epochs)
        with shared_folder() as folder:
            path = folder / "model.keras"
            if hvd.rank() == 0:
                first.save(path)
            hvd.allgather_object(None)
            second = keras.models.load_model(path)
            assert type(second.optimizer) is keras.optimizers.Adam
            if hvd.rank() == 0 and not options:
                steps = str(int(first.optimizer.iterations))
                command = [sys.executable, "-c", LOAD_ELSEWHERE, str(path), steps]
                subprocess.run(command, check=True, timeout=120)
            DistributedOptimizer(second.optimizer, **options)
            history = fit(second, *mine, BATCH, 4, initial_epoch=2)
        assert history.epoch == [2, 3]
        assert digest(second) == digest(through)
        assert all_equal(digest(second))


def check_gradient_tape() -> None:
    """Horovod's own tape, in a loop of one's own, given the variables behind those of Keras."""
    x, y = make_data()
    for compiled in (False, True):
        alone, here = make_model(), make_model()
        alone.compile(optimizer=keras.optimizers.SGD(0.1), loss=MSE, run_eagerly=True)
        fit(alone, x, y, BATCH * hvd.size(), epochs=1)
        optimizer = keras.optimizers.SGD(0.1)
        here.compile(optimizer=optimizer)

        def step(x: tf.Tensor, y: tf.Tensor, model: keras.Model = here, optimizer: Any = optimizer) -> None:
            with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
                loss = MSE(y, model(x, training=True))
            gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

        run = tf.function(step) if compiled else step
        for i in range(STEPS):
            run(tf.constant(x[i, hvd.rank()]), tf.constant(y[i, hvd.rank()]))
        assert_close(here, alone)


def check_names_of_other_objects_do_not_matter() -> None:
    """A rank may hold more Keras objects than others: their counted names are not those of the collectives."""
    for _ in range(hvd.rank()):
        make_model()
        keras.optimizers.SGD()
    x, y = make_data()
    model = make_model()
    model.compile(optimizer=DistributedOptimizer(keras.optimizers.SGD(0.1)), loss=MSE)
    callbacks = [BroadcastVariablesCallback()]
    fit(model, x[:, hvd.rank()], y[:, hvd.rank()], BATCH, callbacks=callbacks)
    assert all_equal(digest(model))


def check_copies_average() -> None:
    """Each way of copying: the gradients of all ranks, also where a rank has made more copies than the others."""
    original = DistributedOptimizer(keras.optimizers.SGD(1.0))
    for _ in range(hvd.rank()):
        copy.deepcopy(original)
    model = make_model()
    model.compile(optimizer=original, loss=MSE)
    for duplicate in (
        copy.deepcopy(original),
        pickle.loads(pickle.dumps(original)),
        original.__class__.from_config(original.get_config()),
        keras.models.clone_model(model).optimizer,
        copy.deepcopy(keras.optimizers.LossScaleOptimizer(original, initial_scale=1.0)),
        copy.deepcopy(model).optimizer,
        pickle.loads(pickle.dumps(model)).optimizer,
    ):
        variables = duplicate._trainable_variables or [keras.Variable(tf.zeros(1))]  # the clone's are those of the model
        before = [v.numpy() for v in variables]
        duplicate.apply([tf.fill(v.shape, tf.cast(hvd.rank(), v.dtype)) for v in variables], variables)
        for variable, value in zip(variables, before, strict=True):
            np.testing.assert_allclose(variable.numpy(), value - (hvd.size() - 1) / 2, rtol=1e-6)  # float32 subtracts


def check_warnings_when_training_starts() -> None:
    """An optimizer that does not average, and plain norms beside synchronized ones; `load_model` mends both."""

    @keras.saving.register_keras_serializable("check_warnings")
    class Own(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.norm = keras.layers.BatchNormalization()
            self.norm.build(shape)

        def call(self, x: Any) -> Any:
            return self.norm(x)

    def said(model: keras.Model, **options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            x, y = np.ones((4, FEATURES)) * hvd.rank(), np.ones((4, FEATURES))
            model.fit(x, y, verbose=0, epochs=2, **options)
        return [str(w.message) for w in caught if "several ranks" in str(w.message)]

    layers = [keras.Input((FEATURES,)), keras.layers.BatchNormalization(), Own(name="own")]
    model = convert_sync_batchnorm(keras.Sequential(layers))
    model.compile(DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
    assert said(model) == []
    with shared_folder() as folder:
        path = folder / f"model{hvd.rank()}.keras"
        model.save(path)
        loaded, ours = keras.models.load_model(path), load_model(path)
        hvd.allgather_object(None)
    found = said(loaded, callbacks=[BroadcastVariablesCallback()])
    assert len(found) == 2, found
    assert "does not average" in found[0], found
    assert "['own.norm']" in found[1], found
    assert said(ours, callbacks=[BroadcastVariablesCallback()]) == []
    assert all_equal(digest(ours))
    alone = keras.models.clone_model(model)
    alone.compile("sgd", "mse")
    assert len(said(alone)) == 2
    dense = make_model()
    dense.compile("sgd", MSE)
    x, y = make_data(steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(dense, x[:, hvd.rank()], y[:, hvd.rank()], BATCH, epochs=1, callbacks=[BroadcastVariablesCallback()])
    assert any("does not average" in str(w.message) for w in caught)
    # Plain norms only: one rank names them, once, whatever hears it.
    for trains in (
        lambda model, said: said(model),
        lambda model, said: said(model, callbacks=[BroadcastVariablesCallback()]),
        lambda model, said: said(model, callbacks=[MetricAverageCallback()]),
    ):
        with shared_folder() as folder:
            path = folder / f"model{hvd.rank()}.keras"
            lost = convert_sync_batchnorm(keras.Sequential([keras.Input((FEATURES,)), Own(name="own")]))
            lost.compile(DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
            lost.save(path)
            lost = keras.models.load_model(path)
        DistributedOptimizer(lost.optimizer)
        first, again = trains(lost, said), trains(lost, said)
        assert again == []
        assert len(first) == (hvd.rank() == 0), first
        assert all("local batch normalizations only" in one and "['own.norm']" in one for one in first), first
    lost = keras.models.clone_model(lost)
    lost.optimizer = None
    lost.compile(keras.optimizers.LossScaleOptimizer(DistributedOptimizer(keras.optimizers.SGD(0.01))), "mse")
    assert len(said(lost)) == (hvd.rank() == 0)
    frozen = keras.models.clone_model(lost)
    frozen.layers[0].trainable = False
    frozen.compile(DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
    assert said(frozen) == []
    # A loop of one's own averages as it likes.
    loop = convert_sync_batchnorm(keras.Sequential([keras.Input((FEATURES,)), keras.layers.BatchNormalization()]))
    loop.compile("sgd", "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loop(np.ones((4, FEATURES)) * hvd.rank(), training=True)


def check_xla() -> None:
    """The callback turns it off; without the callback, one clear error."""
    x, y = make_data()
    model = make_model()
    model.compile(optimizer=DistributedOptimizer(keras.optimizers.SGD(0.1)), loss=MSE, jit_compile=True)
    try:
        fit(model, x[:, hvd.rank()], y[:, hvd.rank()], BATCH)
    except RuntimeError as error:
        assert "jit_compile=False" in str(error), error
    else:
        raise AssertionError("XLA was accepted")
    model.compile(optimizer=model.optimizer, loss=MSE, jit_compile=True)
    fit(model, x[:, hvd.rank()], y[:, hvd.rank()], BATCH, callbacks=[BroadcastVariablesCallback()])
    assert all_equal(digest(model))
