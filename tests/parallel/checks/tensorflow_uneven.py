"""A whole training with ranks that have different numbers of batches, short ones, empty ones; see test_uneven.py."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from keras import layers

from hvd_syncbn.keras import DistributedOptimizer, convert_sync_batchnorm
from tests.arrays import same_bits
from tests.parallel.shared.uneven import BATCHES, part, seed

RANK, SIZE = hvd.rank(), hvd.size()
SINGLE = [hvd.add_process_set([rank]) for rank in range(SIZE)]


def network(process_set: Any) -> keras.Model:
    """Statistics of the first layer depend on the data alone; all of it learns."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float64")
    inputs = keras.Input((4,))
    x = layers.Dense(6)(layers.BatchNormalization()(inputs))
    model = keras.Model(inputs, layers.Dense(3)(layers.ReLU()(layers.BatchNormalization()(x))))
    keras.config.set_dtype_policy("float32")
    return convert_sync_batchnorm(model, process_set)


def gradients(model: keras.Model, x: np.ndarray, target: np.ndarray, scale: float) -> tuple[Any, Any]:
    """Of the sum over these samples times `scale`, by the weights and by x."""
    inputs = tf.constant(x)
    weights = [weight.value for weight in model.trainable_weights]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(target, model(inputs, training=True))
        total = tf.reduce_sum(each) * scale
    by_weights, by_x = tape.gradient(total, [weights, inputs])
    return by_weights, by_x


def check_training() -> None:
    """hvd.join() with DistributedOptimizer around: as one process that has every global batch.

    In float64, where the order of sums differs by 1e-16 of a gradient; what has no gradient in it has the same bytes.
    """
    ours, whole = network(None), network(SINGLE[RANK])
    optimizer, reference = DistributedOptimizer(keras.optimizers.SGD(0.1)), keras.optimizers.SGD(0.1)
    for number, counts in enumerate(BATCHES[SIZE]):
        samples = sum(count or 0 for count in counts)
        x = np.random.default_rng(seed(number)).standard_normal((samples, 4))
        target = np.arange(samples) % 3
        by_weights, _ = gradients(whole, x, target, 1 / samples)
        reference.apply(by_weights, whole.trainable_weights)
        if counts[RANK] is None:
            continue
        mine = part(counts, RANK)
        # Horovod divides by the ranks, also by those that have joined.
        by_weights, by_x = gradients(ours, x[mine], target[mine], SIZE / samples)
        assert by_x.shape == x[mine].shape
        optimizer.apply(by_weights, ours.trainable_weights)
    last = int(hvd.join())
    assert BATCHES[SIZE][-1][last] is not None
    # Those who left early have the weights of that time.
    for weight in ours.weights:
        weight.assign(hvd.broadcast(weight.value, root_rank=last))
    for a, b in zip(ours.layers[1].weights[2:], whole.layers[1].weights[2:], strict=True):
        assert same_bits(a.numpy(), b.numpy()), a.path
    for a, b in zip(ours.weights, whole.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-10, atol=1e-10)
