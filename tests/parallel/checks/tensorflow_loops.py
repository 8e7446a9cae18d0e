"""Ranks without input for a part of the network, and micro-batches, in TensorFlow and Keras; see test_loops.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from hvd_syncbn import vectors
from hvd_syncbn.keras import (
    DistributedOptimizer,
    SyncBatchNormalization,
    accumulate_statistics,
    convert_sync_batchnorm,
    diagnose,
    freeze_batchnorm,
    recalibrate,
    take_part,
)
from tests.tensorflow_tools import assert_same_bits

RANK, SIZE = hvd.rank(), hvd.size()
ALONE = [hvd.add_process_set([rank]) for rank in range(SIZE)][RANK] if SIZE > 1 else None
SAMPLES = vectors.SAMPLES
MINE = vectors.split(SIZE, "uneven")[RANK]


def randn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Head(keras.layers.Layer):
    """Runs one of its layers twice, and one in bfloat16."""

    def __init__(self, process_set: Any = None) -> None:
        super().__init__(name="head")
        options = {"process_set": process_set, "momentum": 0.9}
        self.last = SyncBatchNormalization(name="last", dtype="mixed_bfloat16", **options)
        self.twice, self.first = (SyncBatchNormalization(name=name, **options) for name in ("twice", "first"))
        self.build((None, 4))

    def build(self, input_shape: Any) -> None:
        for norm in (self.last, self.twice, self.first):
            norm.build(input_shape)
        self.built = True

    def call(self, x: Any, training: bool | None = None) -> Any:
        x = self.twice(self.twice(self.first(x, training=training), training=training), training=training)
        return tf.cast(self.last(tf.cast(x, tf.bfloat16), training=training), tf.float32)

    def take_part(self) -> Any:
        """With a layer that runs twice: each call in its turn."""
        return take_part(self.first, self.twice, self.twice, self.last)

    def statistics(self) -> list[np.ndarray]:
        return [weight.numpy() for weight in self.non_trainable_weights]


def inputs(step: int) -> tuple[np.ndarray, list[int]]:
    """The global batch of a head, and this rank's part of it: nothing on one rank, another one in each step."""
    share = vectors.split(SIZE - 1, "uneven") if SIZE > 1 else [[]]
    share.insert(step % SIZE, [])
    return randn(step + 10, SAMPLES, 4), share[RANK] if SIZE > 1 else list(range(SAMPLES))


def outputs_and_gradients(head: Head, x: Any, wrap: Callable[[Any], Any]) -> tuple[Any, Any, list[Any]]:
    """Of a head whose branch the number of samples chooses: outputs, gradients by x, and by the parameters."""

    def run(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss, y = tf.zeros([]), tf.zeros([0, 4])
            if tf.shape(x)[0] > 0:
                y = head(x, training=True)
                loss = tf.reduce_sum(y**2)
            else:
                loss = head.take_part()
        return y, *tape.gradient(loss, [x, [v.value for v in head.trainable_variables]], unconnected_gradients="zero")

    result: tuple[Any, Any, list[Any]] = wrap(run)(tf.constant(x))
    return result


SIGNATURE = [tf.TensorSpec([None, 4])]
WRAPPERS = {"eager": lambda run: run, "graph": tf.function(input_signature=SIGNATURE)}


def check_a_rank_with_nothing() -> None:
    """Outputs, input gradients and moving statistics have the bytes of one process that has all samples.

    In a graph the branch is a `tf.cond`, which each rank takes its own way.
    """
    for wrap in WRAPPERS.values():
        ours, whole = Head(), Head(ALONE)
        for step in range(SIZE + 1):
            x, mine = inputs(step)
            y, dx, _ = outputs_and_gradients(whole, x, lambda run: run)
            my_y, my_dx, by_parameters = outputs_and_gradients(ours, x[mine], wrap)
            assert_same_bits([my_y, my_dx], [y.numpy()[mine], dx.numpy()[mine]])
            assert len(mine) or not any(np.any(gradient) for gradient in by_parameters)
            assert_same_bits(ours.statistics(), whole.statistics())


def check_some_ranks_in_a_graph() -> None:
    """The last rank takes part eagerly, the others run a graph."""
    ours, whole = layer(None), layer(ALONE)
    share = [*(vectors.split(SIZE - 1, "uneven") if SIZE > 1 else [list(range(SAMPLES))]), []]
    x = randn(1, SAMPLES, 3, 4)
    whole(x, training=True)
    if len(share[RANK]):
        tf.function(lambda x: ours(x, training=True))(tf.constant(x[share[RANK]]))
    else:
        take_part(ours)
    assert_same_bits(weights(ours), weights(whole))


def check_every_rank_has_nothing() -> None:
    for wrap in WRAPPERS.values():
        ours = Head()
        before = ours.statistics()
        outputs_and_gradients(ours, np.zeros((0, 4), np.float32), wrap)
        assert_same_bits(ours.statistics(), before)


def check_layers_without_collectives() -> None:
    """Frozen layers: no rank waits for another one."""
    if RANK != 0:
        return
    head = freeze_batchnorm(Head(), affine=True)
    before = head.statistics()
    assert take_part(head) == 0
    assert_same_bits(head.statistics(), before)


class Detector(keras.Model):
    """A trunk, and a head that runs on those samples whose first value is positive."""

    def __init__(self, process_set: Any) -> None:
        super().__init__(name="detector")
        keras.utils.set_random_seed(0)
        self.trunk = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.BatchNormalization()])
        inputs = keras.Input((4,))
        last = keras.layers.BatchNormalization()  # made before the one that runs before it
        outputs = last(keras.layers.Dense(3)(keras.layers.BatchNormalization()(inputs)))
        self.head = keras.Model(inputs, outputs)
        convert_sync_batchnorm(self, process_set)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, *_ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            found = self.trunk(x, training=True)
            boxes = tf.boolean_mask(found, x[:, 0] > 0)
            loss = tf.reduce_sum(tf.sin(found)) + tf.cond(
                tf.shape(boxes)[0] > 0,
                lambda: tf.reduce_sum(self.head(boxes, training=True) ** 2),
                lambda: tf.cast(take_part(self.head), found.dtype),
            )
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        return {"loss": loss}


def check_fit() -> None:
    """A `train_step` in which a rank has no boxes, with DistributedOptimizer: as one process with the global batch."""
    keras.config.set_dtype_policy("float64")
    ours, whole = Detector(None), Detector(ALONE)
    keras.config.set_dtype_policy("float32")
    x = np.abs(randn(3, SIZE, 6, 4).astype(np.float64))
    if SIZE > 1:
        for step in range(3):
            x[step % SIZE, 2 * step : 2 * step + 2, 0] *= -1  # two samples per rank and step
    ours.compile(DistributedOptimizer(keras.optimizers.SGD(0.125 * SIZE)))  # gradients are averaged; the rate is a float32
    ours.fit(x[RANK], batch_size=2, shuffle=False, verbose=0)
    whole.compile(keras.optimizers.SGD(0.125))
    for step in range(3):
        whole.fit(x[:, 2 * step : 2 * step + 2].reshape(-1, 4), batch_size=2 * SIZE, shuffle=False, verbose=0)
    for got, expected in zip(ours.weights, whole.weights, strict=True):
        # In float64, where sums in another order differ by 1e-16.
        np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=1e-10, atol=1e-10, err_msg=got.path)


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"momentum": None},
    "zero_debias": {"zero_debias": True},
    "unbiased": {"unbiased_variance": True},
}


def layer(process_set: Any, **options: Any) -> SyncBatchNormalization:
    made = SyncBatchNormalization(name="layer", process_set=process_set, **options)
    made.build((None, None, 4))
    return made


def weights(norm: SyncBatchNormalization) -> list[np.ndarray]:
    return [weight.numpy() for weight in norm.weights]


def check_micro_batches() -> None:
    """The moving statistics of k micro-batches have the bytes of one batch of all their samples."""
    for options in LAYERS.values():
        for wrap in (lambda run: run, tf.function(input_signature=[tf.TensorSpec([None, 3, 4])])):
            ours, whole = accumulate_statistics(layer(None, **options), 3), layer(ALONE, **options)
            run = wrap(lambda x, ours=ours: ours(x, training=True))
            for update in range(2):
                x = randn(update, 3, SAMPLES, 3, 4)
                whole(x.reshape(-1, 3, 4), training=True)
                for i, micro_batch in enumerate(x):
                    before = weights(ours)
                    run(tf.constant(micro_batch[MINE]))
                    if i < 2:
                        assert_same_bits(weights(ours), before)
                assert_same_bits(weights(ours), weights(whole))


def check_micro_batches_of_a_rank_with_nothing() -> None:
    ours, whole = accumulate_statistics(layer(None), 2), layer(ALONE)
    for update in range(2):
        x = randn(update, 2, SAMPLES, 3, 4)
        whole(x.reshape(-1, 3, 4), training=True)
        for step, micro_batch in enumerate(x):
            _, mine = inputs(step)
            if len(mine):
                ours(micro_batch[mine], training=True)
            else:
                take_part(ours)
    assert_same_bits(weights(ours), weights(whole))


def check_backward_passes_per_step() -> None:
    """In `fit`, with gradient accumulation: one update of the statistics for each step of the optimizer."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="norm")(inputs))
    ours = accumulate_statistics(convert_sync_batchnorm(model), 2)
    whole = SyncBatchNormalization(process_set=ALONE)
    x = randn(1, 4, SIZE, 5, 4)
    ours.compile(DistributedOptimizer(keras.optimizers.SGD(0.1), backward_passes_per_step=2), "mse")
    ours.fit(x[:, RANK].reshape(-1, 4), np.zeros((20, 4)), batch_size=5, shuffle=False, verbose=0)
    for pair in (x[:2], x[2:]):
        whole(pair.reshape(-1, 4), training=True)
    assert_same_bits([w.numpy() for w in ours.layers[1].non_trainable_weights], [w.numpy() for w in whole.weights[2:]])
    # Without accumulation the next epoch updates in every step.
    accumulate_statistics(ours, 1)
    ours.fit(x[:1, RANK].reshape(-1, 4), np.zeros((5, 4)), batch_size=5, shuffle=False, verbose=0)
    whole(x[0].reshape(-1, 4), training=True)
    assert_same_bits([w.numpy() for w in ours.layers[1].non_trainable_weights], [w.numpy() for w in whole.weights[2:]])


def check_diagnose() -> None:
    """The same on every rank, from all ranks' data; a rank with other statistics is named."""

    def network(process_set: Any) -> keras.Sequential:
        norms = [SyncBatchNormalization(name=name, process_set=process_set) for name in ("first", "second")]
        return keras.Sequential([keras.Input((3, 4)), *norms])

    model, whole = network(None), network(ALONE)
    batches = [randn(i, SAMPLES, 3, 4) for i in range(3)]
    mine = [batch[MINE] for batch in batches]
    found = diagnose(model, mine)
    assert hvd.allgather_object(str(found), name="diagnoses") == [str(found)] * SIZE
    recalibrate(whole, batches, process_set=ALONE)
    expected = diagnose(whole, batches, process_set=ALONE)
    recalibrate(model, mine)
    found = diagnose(model, mine)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.shift is not None and other.shift is not None and not one.is_off
        assert one.shift.tobytes() == other.shift.tobytes()
    if RANK == 1:
        model.layers[1].moving_mean.assign_add(np.ones(4, np.float32))
    found = diagnose(model)
    assert [layer.differing_ranks for layer in found.layers] == [(), (1,) if SIZE > 1 else ()]
    if SIZE > 1:
        assert found.advice[0].startswith("The ranks have different running statistics in 'second'. Pass Broadcast")
