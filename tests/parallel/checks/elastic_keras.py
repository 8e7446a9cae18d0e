"""One worker of an elastic job that trains a Keras model: a worker is killed in the middle of an epoch, and comes back.

    python -m tests.parallel.checks.elastic_keras FOLDER

All but the head and the norm is frozen, so the norm's statistics depend on the sequence of global batches alone. Without
horovodrun this is the one process to compare with.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvd_syncbn.keras as hvd

EPOCHS, STEPS, BATCH, FEATURES = 3, 5, 6, 5
KILLED_AT, WAITS_AT = 7, 11  # steps counted from the beginning
WAIT = 150.0


def make_model() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(4, activation="tanh", trainable=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(1),
        ]
    )
    rng = np.random.default_rng(2)
    model.set_weights([np.abs(rng.normal(size=w.shape)) for w in model.get_weights()])
    return hvd.convert_sync_batchnorm(model)


def make_batches() -> tf.data.Dataset:
    """All global batches, one after the other."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(EPOCHS * STEPS, BATCH, FEATURES)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, x.sum(-1, keepdims=True)))


class Fate(keras.callbacks.Callback):
    """Kills rank 1 once; has the one that is left wait for it; keeps what happened."""

    def __init__(self, state: Any, folder: Path) -> None:
        super().__init__()
        self.state = state
        self.killed = folder / "killed"
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        step = self.state.epoch * STEPS + self.state.batch
        if hvd.rank() == 1 and step == KILLED_AT and not self.killed.exists():
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if hvd.size() == 1 and self.killed.exists() and step >= WAITS_AT:
            end = time.monotonic() + WAIT
            while self.state._host_messages.empty() and time.monotonic() < end:
                time.sleep(0.1)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen.append((self.state.epoch * STEPS + self.state.batch, hvd.size()))


def main() -> None:
    folder = Path(sys.argv[1])
    hvd.init()
    keras.utils.set_random_seed(hvd.rank())
    model = make_model()
    optimizer = hvd.DistributedOptimizer(
        keras.mixed_precision.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=4.0, dynamic_growth_steps=6)
    )
    model.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
    state = hvd.elastic.KerasState(model, batch=0, epoch=0)
    resets: list[int] = []
    state.register_reset_callbacks([lambda: resets.append(hvd.size())])
    fate = Fate(state, folder)

    @hvd.elastic.run
    def train(state: Any) -> None:
        rank, size = hvd.rank(), hvd.size()
        batches = make_batches().skip(state.epoch * STEPS + state.batch).map(lambda x, y: (x[rank::size], y[rank::size]))
        callbacks = [
            fate,
            hvd.elastic.UpdateEpochStateCallback(state),
            hvd.elastic.UpdateBatchStateCallback(state),
            hvd.elastic.CommitStateCallback(state),
        ]
        model.fit(batches, initial_epoch=state.epoch, epochs=EPOCHS, steps_per_epoch=STEPS, callbacks=callbacks, verbose=0)

    train(state)
    norm = model.layers[1]
    values = [v.numpy() for v in [*model.weights, *optimizer.variables]]
    outcome = {
        "statistics": [v.numpy().tobytes().hex() for v in (norm.moving_mean, norm.moving_variance)],
        "digest": hashlib.sha256(b"".join(v.tobytes() for v in values)).hexdigest(),
        "scale": float(optimizer.dynamic_scale.numpy()),
        "iterations": int(optimizer.iterations),
        "state": [state.epoch, state.batch],
        "seen": fate.seen,
        "resets": resets,
        "size": hvd.size(),
    }
    (folder / f"{hvd.rank()}.json").write_text(json.dumps(outcome))
    hvd.allgather_object(None)  # horovodrun ends the job when the first one is through
    hvd.shutdown()


if __name__ == "__main__":
    main()
