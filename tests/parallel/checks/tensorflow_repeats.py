"""The same step several times with our DistributedOptimizer for Keras; see test_repeats.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hvd_syncbn.keras import DistributedOptimizer
from tests.parallel.shared import repeats


def train(gradients: repeats.Gradients, delay: float) -> Sequence[NDArray[np.float32]]:
    variables = [keras.Variable(np.zeros_like(gradient), name=f"v{i}") for i, gradient in enumerate(gradients)]
    optimizer = DistributedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build(variables)

    def late(i: int, gradient: Any) -> Any:
        def wait(gradient: Any) -> Any:
            repeats.sleep(delay * i)
            return gradient

        found = tf.numpy_function(wait, [gradient], tf.float32, stateful=False) if delay else tf.identity(gradient)
        return tf.ensure_shape(found, gradient.shape)

    @tf.function(autograph=False)
    def step() -> None:
        optimizer.apply([late(i, tf.constant(gradient)) for i, gradient in enumerate(gradients)], variables)

    step()
    return [variable.numpy() for variable in variables]


def check_repeats() -> list[str]:
    return repeats.digests(hvd, train)
