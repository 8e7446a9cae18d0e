"""What a Horovod timeline is recorded of (HOROVOD_TIMELINE)."""

from __future__ import annotations

import horovod.tensorflow as hvd
import keras
import numpy as np

from hvd_syncbn.keras import SyncBatchNormalization, convert_sync_batchnorm
from tests.tensorflow_tools import step, train

STEPS = 3


def check_fit() -> None:
    """Two branches and a layer used twice, in model.fit."""
    if hvd.rank() == 0:
        keras.Sequential([keras.layers.BatchNormalization()])  # Keras counts on; our names must not
    inputs = keras.Input((4, 4, 3))
    left = keras.Sequential([keras.layers.Conv2D(3, 3, padding="same"), keras.layers.BatchNormalization()], name="left")
    right = keras.Sequential([keras.layers.Conv2D(3, 3, padding="same"), keras.layers.BatchNormalization()], name="right")
    shared = keras.layers.BatchNormalization(name="shared")
    model = keras.Model(inputs, shared(left(inputs)) + shared(right(inputs)))
    convert_sync_batchnorm(model)
    model.compile("sgd", "mse")
    x = np.random.default_rng(hvd.rank()).standard_normal((2 * STEPS, 4, 4, 3))
    model.fit(x, x, batch_size=2, verbose=0)


def check_eager() -> None:
    for _ in range(STEPS):
        train(step((4, 3)), name="eager.layer")


def check_evaluation() -> None:
    """Is silent."""
    layer = SyncBatchNormalization(name="silent")
    layer(np.ones((4, 3), np.float32), training=False)
    layer.trainable = False
    layer(np.ones((4, 3), np.float32), training=True)
