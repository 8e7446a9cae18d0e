"""Batch renormalization in Keras on several ranks; see test_renorm.py."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_syncbn import vectors
from hvd_syncbn.keras import SyncBatchNormalization, accumulate_statistics, take_part
from tests.arrays import same_bits
from tests.parallel.shared import renorm

RANK, SIZE = hvd.rank(), hvd.size()


def layer(axis: int = -1) -> SyncBatchNormalization:
    """The same on every rank."""
    made = SyncBatchNormalization(
        axis,
        1 - renorm.MOMENTUM,
        renorm.EPSILON,
        activation="relu",
        renorm=True,
        renorm_clipping=renorm.CLIPPING,
        renorm_momentum=1 - renorm.RENORM_MOMENTUM,
        name="renorm",
    )
    made.build((None, 3, 2, renorm.CHANNELS) if axis == -1 else (None, renorm.CHANNELS, 3, 2))
    for variable, values in zip((made.gamma, made.beta), renorm.parameters(), strict=True):
        variable.assign(values)
    return made


def statistics(norm: Any) -> list[Any]:
    return [weight.numpy() for weight in norm.non_trainable_weights]


def check_digest() -> list[str]:
    """All ways of dealing out the batches, in both layouts, eager and in a graph."""
    digests = []
    for split in vectors.SPLITS:
        mine = vectors.split(SIZE, split)[RANK]
        for axis in (-1, 1):
            for graph in (False, True):
                norm, results = layer(axis), []

                def step(x: Any, dy: Any, residual: Any, norm: Any = norm) -> Any:
                    with tf.GradientTape() as tape:
                        tape.watch(x)
                        y = norm(x, training=True, residual=residual)
                    return y, tape.gradient(y, x, output_gradients=dy)

                call = tf.function(step, autograph=False) if graph else step
                for number in range(renorm.STEPS):
                    arrays = (a[mine] for a in renorm.batch(number))
                    tensors = (tf.constant(a if axis == -1 else np.moveaxis(a, -1, 1)) for a in arrays)
                    results += [t.numpy() if axis == -1 else np.moveaxis(t.numpy(), 1, -1) for t in call(*tensors)]
                parts = hvd.allgather_object((mine, results))
                digests.append(renorm.digest(parts, statistics(norm)))
    return digests


def check_a_rank_with_nothing_and_micro_batches() -> None:
    """`take_part` and `accumulate_statistics` leave the same statistics on every rank as one step with both batches."""
    here = RANK == 0
    norm, once = accumulate_statistics(layer(), 2), layer()
    batches = [tf.constant(renorm.batch(i)[0]) for i in (1, 2)]
    for own, inputs in ((norm, batches), (once, [tf.concat(batches, 0)])):
        for x in inputs:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(own(x, training=True)) if here else take_part(own)
            tape.gradient(loss, [v.value for v in own.trainable_variables])
    for a, b in zip(statistics(norm), statistics(once), strict=True):
        assert same_bits(a, b)
    assert (once.renorm_mean.numpy() != 0).all()
    for other in hvd.allgather_object(statistics(once)):
        assert all(same_bits(a, b) for a, b in zip(other, statistics(once), strict=True))
