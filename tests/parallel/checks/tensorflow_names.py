"""Names of Keras layers' collectives, in a job with a timeline; see test_names.py."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from hvd_syncbn.keras import convert_sync_batchnorm
from hvd_syncbn.tensorflow import sync_batch_norm

STEPS = 5


def make(width: int, name: str | None) -> keras.Model:
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(width), keras.layers.BatchNormalization()], name=name)


def train(models: Sequence[keras.Model], wrap: Callable[[Any], Any] = tf.function) -> list[str]:
    """Train them in turns, each in a function of its own; the warnings."""

    def step_of(model: keras.Model) -> Callable[[Any], Any]:
        def step(x: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x, training=True) ** 2)
            return tape.gradient(loss, model.trainable_variables[0].value)

        return wrap(step)

    steps = [step_of(model) for model in models]
    x = tf.constant(np.random.default_rng(hvd.rank()).standard_normal((4, 3)).astype("float32"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            for step in steps:
                step(x)
    return [str(warning.message) for warning in caught if "collective name" in str(warning.message)]


def check_models_that_are_converted_one_by_one() -> None:
    assert train([convert_sync_batchnorm(make(width, name)) for width, name in ((4, "generator"), (8, "discriminator"))]) == []


def check_models_of_one_name() -> list[str]:
    """Alike but for their widths: right, slow, and warned of."""
    return train([convert_sync_batchnorm(make(width, "alike")) for width in (4, 8)])


def check_models_of_one_name_eagerly() -> list[str]:
    return train([convert_sync_batchnorm(make(width, "eager")) for width in (4, 8)], lambda step: step)


def check_one_name_twice_in_a_graph() -> None:
    """TensorFlow numbers the second one: two collectives, nothing to warn of."""

    @tf.function
    def step() -> None:
        for width in (4, 8):
            zeros, ones = tf.zeros(width), tf.ones(width)
            x = tf.random.stateless_normal((4, width), (hvd.rank(), width))
            sync_batch_norm(x, ones, zeros, zeros, ones, training=True, name="twice")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(STEPS):
            step()


def check_a_rank_that_has_made_more() -> None:
    """Rank 0 has converted other models, and has its own from a file: as where a new worker joins old ones."""
    model = make(4, None)
    if hvd.rank() == 0:
        convert_sync_batchnorm(make(8, None))
        convert_sync_batchnorm(model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.keras"
            model.save(path)
            model = keras.models.load_model(path)
    else:
        convert_sync_batchnorm(model)
    norm = model.layers[-1]
    y = norm(np.random.default_rng(hvd.rank()).standard_normal((4, 4)).astype("float32"), training=True)
    everyone = hvd.allgather_object((norm.moving_mean.numpy().tobytes(), y.numpy()))
    assert everyone[0][0] == everyone[1][0]
    np.testing.assert_allclose(np.concatenate([y for _, y in everyone]).mean(0), 0, atol=1e-6)
