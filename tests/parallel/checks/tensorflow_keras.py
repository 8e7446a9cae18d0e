"""The Keras layer under horovodrun, in model.fit with the rest of hvd_syncbn.keras.

The reference is the same model on the global batch, its layers alone in process sets of one rank. Models are float64 where
convolutions and Horovod's averages of gradients make them differ in the last bits.
"""

from __future__ import annotations

import hashlib
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from keras import layers

from hvd_syncbn.keras import (
    BroadcastVariablesCallback,
    DistributedOptimizer,
    MetricAverageCallback,
    SyncBatchNormalization,
    convert_sync_batchnorm,
    freeze_batchnorm,
)
from tests.arrays import same_bits

STEPS, BATCH, SHAPE = 3, 2, (6, 6, 3)


@cache
def alone() -> Any:
    """A process set of this rank."""
    return [hvd.add_process_set([rank]) for rank in range(hvd.size())][hvd.rank()]


def make_model(process_set: Any = None, seed: int = 0, dtype: str = "float64", counted: int = 0) -> keras.Model:
    keras.config.set_dtype_policy(dtype)
    keras.utils.set_random_seed(seed)
    for _ in range(counted):  # Keras counts its objects, and ranks may differ in that
        layers.BatchNormalization()
    inputs = keras.Input(SHAPE)
    x = layers.BatchNormalization(momentum=0.9)(layers.Conv2D(4, 3)(inputs))
    block = keras.Sequential([layers.ReLU(), layers.Conv2D(4, 3, padding="same"), layers.BatchNormalization(momentum=0.9)])
    x = layers.GlobalAveragePooling2D()(layers.Add()([x, block(x)]))
    model = keras.Model(inputs, layers.Dense(2, dtype="float32" if dtype.startswith("mixed") else dtype)(x))
    keras.config.set_dtype_policy("float32")
    return convert_sync_batchnorm(model, process_set)


def data(steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """The global data as (steps, ranks, batch, ...)."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((steps, hvd.size(), BATCH, *SHAPE)) * 3 + 1).astype(np.float32)  # as `fit` would
    return x, np.stack([x.mean((3, 4, 5)), x.max((3, 4, 5))], -1)


def fit(model: keras.Model, x: np.ndarray, y: np.ndarray, ranks: int = 1, **options: Any) -> Any:
    options = {"epochs": 2, "shuffle": False, "verbose": 0} | options
    return model.fit(x.reshape(-1, *SHAPE), y.reshape(-1, 2), batch_size=BATCH * ranks, **options)


def mine(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(array[:, hvd.rank()] for array in arrays)


def loss() -> Any:
    return keras.losses.MeanSquaredError(dtype="float64")


def sgd() -> Any:
    return keras.optimizers.SGD(0.01, momentum=0.9)


def digest(model: keras.Model) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(w).tobytes() for w in model.get_weights())).hexdigest()


def all_equal(value: object) -> bool:
    return len(set(hvd.allgather_object(value))) == 1


def assert_close(model: keras.Model, other: keras.Model, tolerance: float = 1e-10) -> None:
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def check_layer_bits() -> None:
    """Without a convolution: outputs, input gradients and moving statistics, in every policy, eager and in a graph."""
    x, dy = (np.random.default_rng(i).standard_normal((hvd.size(), 3, 5, 4)) for i in (2, 3))
    for policy in ("float32", "mixed_float16", "mixed_bfloat16", "float64"):
        for graph in (False, True):
            results = []
            for process_set, part in ((None, hvd.rank()), (alone(), slice(None))):
                stack = [
                    SyncBatchNormalization(activation="relu", dtype=policy, process_set=process_set, name=f"{policy}.{i}")
                    for i in range(3)
                ]

                def run(x: Any, dy: Any, stack: Any = tuple(stack)) -> Any:
                    with tf.GradientTape() as tape:
                        tape.watch(x)
                        y = stack[0](x, training=True)
                        y = stack[2](stack[1](y, training=True), training=True, residual=y)
                    return y, tape.gradient(y, x, output_gradients=dy)

                dtype = stack[0].compute_dtype
                inputs, gradients = (tf.cast(t[part].reshape(-1, 5, 4), dtype) for t in (x, dy))
                y, dx = (tf.function(run, autograph=False) if graph else run)(inputs, gradients)
                moving = [w for layer in stack for w in layer.non_trainable_weights]
                results.append([y.numpy(), dx.numpy(), *(w.numpy() for w in moving)])
            own = slice(3 * hvd.rank(), 3 * hvd.rank() + 3)
            for i, (got, expected) in enumerate(zip(*results, strict=True)):
                assert same_bits(got, expected[own] if i < 2 else expected), (policy, graph, i)


def check_fit_equals_one_process() -> None:
    """With both callbacks and those of Keras that decide by metrics, and weights that differ before the first step."""
    x, y = data()
    one = make_model(alone())
    one.compile(sgd(), loss())
    fit(one, x, y, ranks=hvd.size())
    for run_eagerly in (False, True):
        model = make_model(seed=hvd.rank(), counted=3 * hvd.rank())
        model.compile(DistributedOptimizer(sgd()), loss(), run_eagerly=run_eagerly)
        with tempfile.TemporaryDirectory() as folder:
            best = Path(folder) / "best.keras"
            callbacks = [
                BroadcastVariablesCallback(),
                MetricAverageCallback(),
                keras.callbacks.EarlyStopping(monitor="loss", patience=1),
                keras.callbacks.ModelCheckpoint(best, monitor="loss", save_best_only=True),
            ]
            history = fit(model, *mine(x, y), callbacks=callbacks)
            assert len(history.epoch) == 2
            assert all_equal(digest(model))
            assert all_equal(tuple(history.history["loss"]))
            assert_close(model, one)
            assert digest(keras.models.load_model(best)) == digest(model)


def check_plain_batch_norm_is_not_that() -> None:
    """That the comparison above sees what it is to see."""
    x, y = data()
    one, model = make_model(alone()), make_model(alone())
    one.compile(sgd(), loss())
    model.compile(DistributedOptimizer(sgd()), loss())
    fit(one, x, y, ranks=hvd.size())
    fit(model, *mine(x, y), callbacks=[BroadcastVariablesCallback()])
    assert max(np.abs(a - b).max() for a, b in zip(model.get_weights(), one.get_weights(), strict=True)) > 1e-3


def check_save_load_resume() -> None:
    """Two epochs, a file, two more: the bytes of four epochs."""
    x, y = data()
    through, first = make_model(), make_model()
    for model, epochs in ((through, 4), (first, 2)):
        model.compile(DistributedOptimizer(sgd()), "mse")  # a loss object would be loaded as float32
        fit(model, *mine(x, y), epochs=epochs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        first.save(path)
        second = keras.models.load_model(path)
    DistributedOptimizer(second.optimizer)
    fit(second, *mine(x, y), epochs=4, initial_epoch=2)
    assert digest(second) == digest(through)
    assert all_equal(digest(second))


def check_saved_process_set() -> None:
    """A file holds the ranks; the set of just these ranks is found when the loaded model is trained."""
    x = np.random.default_rng(hvd.rank()).standard_normal((4, 3)).astype(np.float32)
    model = keras.Sequential([keras.Input((3,)), SyncBatchNormalization(process_set=alone(), name="own")])
    loaded = keras.models.model_from_json(model.to_json())
    assert loaded.layers[0].get_config()["process_set"] == [hvd.rank()]
    assert same_bits(loaded(x, training=True), model(x, training=True))
    np.testing.assert_allclose(model.layers[0].moving_mean, 0.01 * x.mean(0), rtol=1e-4)
    everyone = keras.Sequential([keras.Input((3,)), SyncBatchNormalization(process_set=list(range(hvd.size())), name="all")])
    everyone(x, training=True)
    assert all_equal(everyone.layers[0].moving_mean.numpy().tobytes())


def check_mixed_precision_fit() -> None:
    x, y = data()
    for policy in ("mixed_float16", "mixed_bfloat16"):
        model = make_model(dtype=policy)
        model.compile(DistributedOptimizer(sgd()), "mse")
        history = fit(model, *mine(x, y))
        assert np.isfinite(history.history["loss"]).all()
        assert all_equal(digest(model))


def check_custom_loop() -> None:
    """Horovod's own tape, which names its collectives by Keras's counted names: those have to agree for it."""
    keras.utils.clear_session()
    x, y = data()
    one, model = make_model(alone()), make_model()
    one.compile(sgd(), loss())
    fit(one, x, y, ranks=hvd.size(), epochs=1)
    optimizer = sgd()
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x: Any, y: Any) -> None:
        with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
            error = loss()(y, model(x, training=True))
        gradients = tape.gradient(error, [v.value for v in model.trainable_variables])
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    for i in range(STEPS):
        step(*(tf.constant(t[i, hvd.rank()]) for t in (x, y)))
    assert_close(model, one)


def check_evaluation_is_local() -> None:
    """Ranks may predict what they like, as often as they like."""
    model = make_model()
    for _ in range(1 + hvd.rank()):
        model.predict(np.zeros((1 + hvd.rank(), *SHAPE)), verbose=0)
    model.trainable = False
    if hvd.rank() == 0:
        model(np.zeros((1, *SHAPE)), training=True)


def check_frozen_layers_are_local() -> None:
    """One rank trains alone: a collective would wait for the others."""
    x, y = data()
    for affine in (False, True):
        model = freeze_batchnorm(make_model(dtype="float32"), affine)
        before = [w.numpy() for layer in model._flatten_layers() for w in getattr(layer, "_non_trainable_variables", [])]
        if hvd.rank() == 0:
            model.compile(sgd(), loss())
            fit(model, *mine(x, y))
        after = [w.numpy() for layer in model._flatten_layers() for w in getattr(layer, "_non_trainable_variables", [])]
        assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))
