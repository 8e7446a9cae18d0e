"""TensorFlow's layers in processes forked from a rank: an error on several ranks.

TensorFlow's own threads are not in a forked process: a function that was traced in the rank never ends there, also without this
layer. So nothing here traces before it forks.
"""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

import hvd_syncbn.keras as api
from hvd_syncbn.tensorflow import sync_batch_norm
from tests.parallel.shared.forks import assert_refused, in_fork

X = np.random.default_rng(hvd.rank()).standard_normal((4, 3)).astype("float32")
VECTOR = np.ones(3, "float32")


def layer() -> Any:
    made = api.SyncBatchNormalization(name="layer")
    made.build(X.shape)
    return made


def check_layers() -> None:
    one = layer()
    model = keras.Sequential([keras.Input((3,)), api.SyncBatchNormalization(), keras.layers.Dense(1)])
    model.compile(api.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    traced = tf.function(lambda x: one(x, training=True))
    for run in (
        lambda: sync_batch_norm(X, VECTOR, VECTOR, VECTOR, VECTOR, training=True),
        lambda: one(X, training=True),
        lambda: traced(X),
        lambda: model.fit(X, X[:, :1], verbose=0),
        lambda: model.fit(X, X[:, :1], verbose=0, callbacks=[api.BroadcastVariablesCallback()]),
        lambda: api.recalibrate(model, [X], progress=False),
        lambda: tf.py_function(lambda x: one(x, training=True), [X], tf.float32),
    ):
        told = in_fork(run)
        assert "forked after `hvd.init()`" in told and ".eval()" in told, told
    assert in_fork(lambda: one(X, training=False).shape) == "(4, 3)"


def check_functions() -> None:
    """Of our Keras API, those that exchange something."""
    variables = layer().variables
    for run in (
        lambda: api.groups(1),
        lambda: api.allreduce(1.0),
        lambda: api.allgather([1.0]),
        lambda: api.broadcast(1.0, 0),
        lambda: api.reducescatter([1.0, 2.0]),
        lambda: api.broadcast_variables(variables),
    ):
        assert_refused(run)


def check_the_rank_goes_on() -> None:
    layer()(X, training=True)
    assert api.allreduce(1.0).numpy() == 1.0
