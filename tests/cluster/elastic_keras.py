"""One worker of an elastic Keras job, `model.fit` with KerasState, in which workers die as `plan.json` says; see elastic.py.

As in elastic_torch.py both layers' moving statistics, at the end, have to be those of one process that was given the same
global batches: `python -m tests.cluster.elastic_keras`, with them on its standard input. Every worker takes the next two
samples that the others do not take; the position is part of the state.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvd_syncbn.keras as hvd
from tests.cluster.death import Plan, log

SAMPLES, BATCH, EPOCH = 128, 2, 5


class Fault(keras.layers.Layer):
    """The identity, in which this worker dies in the middle of a compiled step, forward or backward."""

    def __init__(self, plan: Plan | None) -> None:
        super().__init__()
        self.plan = plan

    def call(self, x: Any) -> Any:
        if self.plan is None:
            return x

        def here(where: str, x: Any) -> Any:
            def act(x: Any) -> Any:
                assert self.plan is not None
                self.plan.here(where, hvd.rank())
                return x

            y = tf.py_function(act, [x], x.dtype)
            y.set_shape(x.shape)
            return y

        @tf.custom_gradient
        def identity(x: Any) -> Any:
            return here("forward", x), lambda dy: here("backward", dy)

        return identity(x)


def make_model(plan: Plan | None) -> keras.Model:
    """Two synchronized layers, between which a worker can die; what is trained comes after them."""
    norms = [keras.layers.BatchNormalization(center=False, scale=False, name=name) for name in ("first", "second")]
    model = keras.Sequential([keras.Input((3,)), norms[0], keras.layers.ReLU(), Fault(plan), norms[1], keras.layers.Dense(1)])
    return hvd.convert_sync_batchnorm(model)


def data() -> Any:
    """All samples."""
    return np.random.default_rng(1).standard_normal((SAMPLES, 3)).astype("float32") * 3 + 5


def statistics(model: keras.Model) -> list[str]:
    """Moving statistics, as bytes."""
    return [weight.numpy().tobytes().hex() for name in ("first", "second") for weight in model.get_layer(name).weights]


def replay(batches: Sequence[Sequence[int]]) -> list[str]:
    """What one process has at the end that is given these global batches (indices of samples)."""
    hvd.init()
    model, samples = make_model(None), data()
    for batch in batches:
        model(samples[list(batch)], training=True)
    hvd.shutdown()
    return statistics(model)


class Progress(keras.callbacks.Callback):
    """Says what this worker's batches are, and counts what all have done."""

    def __init__(self, state: Any, plan: Plan) -> None:
        super().__init__()
        self.state = state
        self.plan = plan
        self.key = ""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.plan.step = len(self.state.history)
        self.key = f"{self.state.round}, {hvd.size()}, {self.plan.step}"
        log(self.plan.folder, event="batch", key=self.key, samples=taken(self.state.position))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.plan.here("between", hvd.rank())
        self.state.position += BATCH * hvd.size()
        self.state.history = [*self.state.history, self.key]


def taken(position: int) -> list[int]:
    """The samples that this worker takes of the next global batch."""
    first = position + BATCH * hvd.rank()
    return [number % SAMPLES for number in range(first, first + BATCH)]


def main() -> None:
    """The worker; without arguments, what it is compared with."""
    if len(sys.argv) == 1:
        print(json.dumps(replay(json.load(sys.stdin))))
        return
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    hvd.init()
    plan = Plan(folder)
    model = make_model(plan)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
    state = hvd.elastic.KerasState(model, round=0, batch=0, epoch=0, position=0, history=[])
    samples = data()

    @hvd.elastic.run
    def train(state: Any) -> None:
        state.round += 1
        state.save()
        log(folder, event="loop", rank=hvd.rank(), size=hvd.size(), step=len(state.history), round=state.round)
        left = steps - len(state.history)
        rows = [taken(state.position + BATCH * hvd.size() * number) for number in range(left)]
        x = samples[np.array(rows)]
        callbacks = [
            Progress(state, plan),
            hvd.elastic.UpdateEpochStateCallback(state),
            hvd.elastic.UpdateBatchStateCallback(state),
            hvd.elastic.CommitStateCallback(state),
        ]
        model.fit(
            tf.data.Dataset.from_tensor_slices((x, x.sum(-1, keepdims=True))),
            initial_epoch=state.epoch,
            epochs=steps // EPOCH,
            steps_per_epoch=EPOCH,
            callbacks=callbacks,
            verbose=0,
        )

    train(state)
    if hvd.rank() == 0:
        (folder / "result.json").write_text(json.dumps({"history": state.history, "statistics": statistics(model)}))
    log(folder, event="end", rank=hvd.rank(), size=hvd.size(), step=len(state.history))
    hvd.allgather_object(None)  # the first to end ends Horovod for all


if __name__ == "__main__":
    main()
