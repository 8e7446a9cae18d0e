"""Variables that take their gradient as their value (float8 training) under a distributed optimizer, on one rank."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from hvd_syncbn.keras import DistributedOptimizer, PartialDistributedOptimizer

tf = pytest.importorskip("tensorflow")
pytest.importorskip("horovod.tensorflow")

GRADIENTS = ([1.0, 9.0], [3.0, 2.0])


@pytest.fixture(autouse=True)
def horovod() -> None:
    import horovod.tensorflow as hvd

    hvd.init()


def overwritten() -> Any:
    variable = keras.Variable(np.zeros(2), dtype="float32")
    variable.overwrite_with_gradient = True
    return variable


def trained(optimizer: Any) -> list[list[float]]:
    """The values of an overwritten variable and of a common one after two batches."""
    variables = [overwritten(), keras.Variable(np.zeros(2), dtype="float32")]
    for gradient in GRADIENTS:
        optimizer.apply([tf.constant(gradient)] * 2, variables)
    return [np.asarray(v.numpy()).tolist() for v in variables]


@pytest.mark.parametrize("wrap", [DistributedOptimizer, PartialDistributedOptimizer])
def test_accumulated_as_keras_does(wrap: Any) -> None:
    reference = trained(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2))
    assert reference == [[3.0, 9.0], [-2.0, -5.5]]
    assert trained(wrap(keras.optimizers.SGD(1.0), backward_passes_per_step=2)) == reference


def test_accumulated_in_a_loss_scale_optimizer() -> None:
    scale = keras.mixed_precision.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=1.0)
    assert trained(DistributedOptimizer(scale, backward_passes_per_step=2)) == [[3.0, 9.0], [-2.0, -5.5]]


def test_a_quantized_model_trains_as_with_keras_accumulation() -> None:
    """Scales and largest inputs of two batches for one update; and weights, to the rounding of sums."""

    def train(make: Any) -> list[np.ndarray]:
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
        rng = np.random.default_rng(1)
        model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
        model.quantize("float8")
        model.compile(make(), "mse")
        x = np.random.default_rng(2).normal(size=(16, 4)).astype("float32")
        model.fit(x, x[:, :1], batch_size=4, epochs=1, shuffle=False, verbose=0)
        chosen = [v for v in model.trainable_variables if v.overwrite_with_gradient]
        assert len(chosen) == 12
        return [v.numpy() for v in chosen]

    ours = train(lambda: DistributedOptimizer(keras.optimizers.SGD(0.0), backward_passes_per_step=2))
    keras_own = train(lambda: keras.optimizers.SGD(0.0, gradient_accumulation_steps=2))
    assert [v.tobytes() for v in ours] == [v.tobytes() for v in keras_own]
