"""XLA, exports and eager names."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

from hvd_syncbn.keras import SyncBatchNormalization, freeze_batchnorm
from hvd_syncbn.tf_impl import horovod
from tests.arrays import same_bits
from tests.tensorflow_tools import step

CHANNELS = 4


def model(frozen: bool = False) -> keras.Model:
    made = keras.Sequential([keras.Input((CHANNELS,)), SyncBatchNormalization(name="norm"), keras.layers.ReLU()])
    return freeze_batchnorm(made, affine=True) if frozen else made


def data() -> tf.Tensor:
    return tf.constant(step((8, CHANNELS)).x[hvd.rank() :: hvd.size()])


def gradient(run: Callable[..., Any], x: Any) -> Any:
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = run(x)
    return tape.gradient(y, x)


def check_jit_compile_is_refused() -> None:
    """By the layer's name, on every rank, before anything is sent: the ranks are in step afterwards."""
    x, ours = data(), model()

    def train(x: Any) -> Any:
        return ours(x, training=True)

    def jit(function: Callable[..., Any]) -> Any:
        return tf.function(function, jit_compile=True)

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = train(x)
    nested = tf.function(train)
    ways: dict[str, Callable[[], Any]] = {
        "call": lambda: jit(train)(x),
        "concrete": lambda: jit(train).get_concrete_function(x),
        "gradient": lambda: jit(lambda x: gradient(train, x))(x),
        "the gradient alone": lambda: jit(lambda: tape.gradient(y, x))(),
        "nested": lambda: jit(lambda x: nested(x))(x),
        "nested in a plain one": lambda: tf.function(lambda x: jit(train)(x))(x),
        "branch": lambda: jit(lambda x: tf.cond(tf.reduce_sum(x) > 0, lambda: train(x), lambda: x))(x),
        "recomputed": lambda: jit(lambda x: gradient(tf.recompute_grad(train), x))(x),
    }
    for name, way in ways.items():
        with pytest.raises(RuntimeError, match="Received: layer 'norm' in a function with jit_compile=True") as raised:
            way()
        assert "Pass jit_compile=False" in str(raised.value), name
    # Traced before, it is not traced again: XLA's own error has the name and the remedy.
    nested(x)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"hvd_syncbn\.norm\.set_jit_compile_False"):
        jit(lambda x: nested(x))(x)
    assert len(set(hvd.allgather_object(hashlib.sha256(ours.layers[0].moving_mean.numpy().tobytes()).hexdigest()))) == 1


def check_frozen_layers_are_compiled() -> None:
    x, ours = data(), model(frozen=True)
    ours.layers[0].set_weights([v[0] for v in np.split(step((5, CHANNELS)).x[:4] ** 2 + 1, 4)])

    def train(x: Any) -> Any:
        return ours(x, training=True)

    for function in (train, lambda x: gradient(train, x)):
        np.testing.assert_allclose(tf.function(function, jit_compile=True)(x), function(x), rtol=1e-5)  # XLA's arithmetic


def check_export() -> None:
    """In inference it is plain TensorFlow; in training, an error, whichever way it is exported and however it was traced."""
    x, ours = data(), model()
    ours.compile("sgd", "mse")
    ours.fit(x, x, batch_size=len(x), verbose=0)
    spec = [tf.TensorSpec([None, CHANNELS])]

    def train(x: Any) -> Any:
        return ours(x, training=True)

    def archive(made: keras.Model, training: bool) -> None:
        exported = keras.export.ExportArchive()
        exported.track(made)
        exported.add_endpoint("serve", lambda x: made(x, training=training), input_signature=spec)
        exported.write_out(folder, verbose=False)

    def module(signature: Any, call: bool) -> tf.Module:
        made = tf.Module()
        made.train = tf.function(train, input_signature=signature)
        if call:
            made.train(x)
        return made

    called = module(None, True)
    with tempfile.TemporaryDirectory() as folder:
        for way in (
            lambda: archive(ours, True),
            lambda: tf.saved_model.save(called, folder),
            lambda: tf.saved_model.save(module(spec, False), folder),
            lambda: tf.saved_model.save(module(spec, True), folder),
            lambda: tf.saved_model.save(called, folder, signatures=called.train.get_concrete_function(*spec)),
        ):
            with pytest.raises(RuntimeError, match="Received: layer 'norm' in an exported function, with training=True"):
                way()
    with tempfile.TemporaryDirectory() as folder:
        ours.export(folder, verbose=False)
        assert "HvdSyncbn" not in _operators(folder)
    with tempfile.TemporaryDirectory() as folder:
        archive(model(frozen=True), True)
        assert "HvdSyncbn" not in _operators(folder)


def _operators(folder: str) -> str:
    with open(f"{folder}/saved_model.pb", "rb") as file:
        return repr(file.read())


def check_eager_layers() -> None:
    """Any number of layers: no warning of retracing, no function left for each, also where functions run eagerly."""
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    tf.get_logger().addHandler(handler)
    x = data()
    size = horovod._eager_allreduces.cache_parameters()["maxsize"]
    expected = gradient(lambda x: model()(x, training=True), x)
    try:
        for eagerly in (False, True):
            tf.config.run_functions_eagerly(eagerly)
            for number in range(16):
                layer = SyncBatchNormalization(name=f"made_{eagerly}_{number}")
                assert same_bits(gradient(lambda x, layer=layer: tf.nn.relu(layer(x, training=True)), x), expected)
                layer(x, training=True)
        for number in range(size):
            horovod._eager_allreduces((f"hvd_syncbn.other_{number}.forward", 0, tf.int64))
    finally:
        tf.config.run_functions_eagerly(False)
        tf.get_logger().removeHandler(handler)
    assert not warned, warned[0]
    assert sum("hvd_syncbn" in str(name) for name in context.context().list_function_names()) == size
    assert same_bits(gradient(lambda x: model()(x, training=True), x), expected)
