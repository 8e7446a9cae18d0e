"""One worker of an elastic Keras job, `model.fit` with KerasState, in which workers die as `plan.json` says; see elastic.py.

As in elastic_torch.py the moving statistics of two layers, at the end, have to be those of one process that was given the same
global batches, and a third one's those of rank 0's groups; without arguments this is that process. Every worker takes the next
two samples that the others do not take; the position is part of the state.
"""

from __future__ import annotations

import json
import os
import sys
import time
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


class Network(keras.Model):
    """Two synchronized layers, between which a worker can die, and one more for a group.

    What is trained comes after them, but for a shift that is 0 again after every step: for it the gradient goes all the way.
    """

    def __init__(self, plan: Plan | None) -> None:
        super().__init__()
        norms = [keras.layers.BatchNormalization(center=False, scale=False) for _ in range(3)]
        self.trunk = keras.Sequential([norms[0], keras.layers.ReLU(), Fault(plan), norms[1], keras.layers.Dense(1)])
        self.grouped = keras.Sequential([norms[2]])
        self.shift = self.add_weight(shape=(3,), initializer="zeros", constraint=keras.ops.zeros_like)
        self(keras.ops.zeros((1, 3)))

    def call(self, x: Any, training: bool = False) -> Any:
        self.grouped(x, training=training)
        return self.trunk(x + self.shift, training=training)


def data() -> Any:
    """All samples."""
    return np.random.default_rng(1).standard_normal((SAMPLES, 3)).astype("float32") * 3 + 5


def statistics(model: keras.Model) -> list[str]:
    """Moving statistics, as bytes."""
    return [weight.numpy().tobytes().hex() for weight in model.non_trainable_weights]


def replay(batches: Sequence[Sequence[int]], grouped: Sequence[Sequence[int]]) -> list[str]:
    """What one process has at the end that is given these batches of all ranks, and of rank 0's group (indices of samples)."""
    hvd.init()
    model, samples = hvd.convert_sync_batchnorm(Network(None)), data()
    for layers, given in ((model.trunk, batches), (model.grouped, grouped)):
        for batch in given:
            layers(samples[list(batch)], training=True)
    hvd.shutdown()
    return statistics(model)


class Progress(keras.callbacks.Callback):
    """Says what this worker's batches are, and counts what all have done."""

    def __init__(self, state: Any, plan: Plan, steps: int, group: list[int]) -> None:
        super().__init__()
        self.state = state
        self.plan = plan
        self.steps = steps
        self.group = group
        self.key = ""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.plan.step = len(self.state.history)
        self.key = f"{self.state.round}, {hvd.size()}, {self.plan.step}"
        log(self.plan.folder, event="batch", key=self.key, rank=hvd.rank(), samples=taken(self.state.position))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.plan.here("between", hvd.rank())
        self.state.position += BATCH * hvd.size()
        self.state.history = [*self.state.history, self.key]
        self.state.groups = [*self.state.groups, self.group]
        if len(self.state.history) == self.steps or ((self.plan.folder / "now").exists() and hvd.size() == 1):
            self.model.stop_training = True
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))


def taken(position: int) -> list[int]:
    """The samples that this worker takes of the next global batch."""
    first = position + BATCH * hvd.rank()
    return [number % SAMPLES for number in range(first, first + BATCH)]


def main() -> None:
    """The worker; without arguments, what it is compared with."""
    if len(sys.argv) == 1:
        print(json.dumps(replay(**json.load(sys.stdin))))
        return
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    hvd.init(process_sets="dynamic")
    plan = Plan(folder)
    model = hvd.convert_sync_batchnorm(Network(plan))
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
    state = hvd.elastic.KerasState(model, round=0, batch=0, epoch=0, position=0, history=[], groups=[])
    samples = data()

    @hvd.elastic.run
    def train(state: Any) -> None:
        state.round += 1
        state.save()
        # Of 4 ranks two pairs, of fewer each alone: sets that Horovod does not have yet.
        mine = hvd.groups(max(1, hvd.size() // 2)).mine
        hvd.convert_sync_batchnorm(model.grouped, process_set=mine)
        model.make_train_function(force=True)  # a part of it was converted, of which it does not know
        log(folder, event="loop", rank=hvd.rank(), size=hvd.size(), step=len(state.history), round=state.round)
        left = steps - len(state.history)
        x = samples[np.array([taken(state.position + BATCH * hvd.size() * number) for number in range(left)])]
        callbacks = [
            Progress(state, plan, steps, mine.ranks or list(range(hvd.size()))),
            hvd.elastic.UpdateEpochStateCallback(state),
            hvd.elastic.UpdateBatchStateCallback(state),
            hvd.elastic.CommitStateCallback(state),
        ]
        model.fit(
            tf.data.Dataset.from_tensor_slices((x, x.sum(-1, keepdims=True))),
            initial_epoch=state.epoch,
            epochs=steps,
            steps_per_epoch=EPOCH,
            callbacks=callbacks,
            verbose=0,
        )

    train(state)
    if hvd.rank() == 0:
        result = {"history": state.history, "groups": state.groups, "statistics": statistics(model)}
        (folder / "result.json").write_text(json.dumps(result))
    log(folder, event="end", rank=hvd.rank(), size=hvd.size(), step=len(state.history))
    hvd.allgather_object(None)  # the first to end ends Horovod for all


if __name__ == "__main__":
    main()
