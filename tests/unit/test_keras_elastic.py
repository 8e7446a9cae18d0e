"""The elastic callbacks in one process: what is committed, and that training goes on from any commit with what was left."""

from __future__ import annotations

import types
from typing import Any

import keras
import numpy as np
import pytest

pytest.importorskip("horovod.tensorflow")

import tensorflow as tf

from hvd_syncbn.keras import elastic

EPOCHS, STEPS = 3, 4


class State(types.SimpleNamespace):
    """Counts and commits, without Horovod."""

    def commit(self) -> None:
        self.committed.append((self.epoch, self.batch))


def train(epoch: int, batch: int, initial_epoch: bool, commits: int = 1, stop_at: int | None = None) -> tuple[Any, list[int]]:
    """`fit()` from there on; the state, and the batches it has seen."""
    state, seen = State(epoch=epoch, batch=batch, committed=[]), []

    class Model(keras.Model):
        def train_step(self, data: Any) -> dict[str, Any]:
            seen.append(int(data[0]))
            return {"loss": 0.0}

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == stop_at:
                self.model.stop_training = True

    model = Model()
    model.compile(loss="mse", run_eagerly=True)
    data = tf.data.Dataset.range(EPOCHS * STEPS).skip(epoch * STEPS + batch).map(lambda i: (i, i))
    callbacks = [
        Stop(),
        elastic.UpdateEpochStateCallback(state),
        elastic.UpdateBatchStateCallback(state),
        elastic.CommitStateCallback(state, commits),
    ]
    epochs = {"initial_epoch": epoch, "epochs": EPOCHS} if initial_epoch else {"epochs": EPOCHS - epoch}
    model.fit(data, steps_per_epoch=STEPS, callbacks=callbacks, verbose=0, **epochs)
    return state, seen


@pytest.mark.parametrize("initial_epoch", [True, False])
@pytest.mark.parametrize("commits", [1, 2, 3, 5])
def test_every_batch_once_from_any_commit(commits: int, initial_epoch: bool) -> None:
    state, seen = train(0, 0, initial_epoch, commits)
    assert seen == list(range(EPOCHS * STEPS))
    assert [c for c in state.committed if c[1] == 0] == [(epoch, 0) for epoch in range(1, EPOCHS + 1)]
    for epoch, batch in state.committed:
        assert batch < STEPS
        if epoch < EPOCHS:
            again, rest = train(epoch, batch, initial_epoch, commits)
            assert rest == list(range(epoch * STEPS + batch, EPOCHS * STEPS))
            assert (again.epoch, again.batch) == (EPOCHS, 0)


def test_who_else_stops_is_heard() -> None:
    """In an epoch that is shortened, too."""
    state, seen = train(1, 2, True, stop_at=1)
    assert seen == [6, 7]
    assert (state.epoch, state.batch) == (2, 0)


def test_bad_batches_per_commit() -> None:
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"Received: batches_per_commit={bad}"):
            elastic.CommitStateCallback(None, bad)


def test_models_that_are_not_ready() -> None:
    model = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="not built"):
        elastic.KerasState(model)
    model.build((None, 2))
    with pytest.raises(ValueError, match="without an optimizer"):
        elastic.KerasState(model)


@pytest.mark.parametrize("inner", ["sgd", "adagrad"])  # Adagrad calls its state `_accumulators`
def test_restore(inner: str) -> None:
    """Weights, seeds, the optimizer with its LossScaleOptimizer, and what else the state keeps."""
    import hvd_syncbn.keras as hvd

    hvd.init()
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    optimizer = keras.mixed_precision.LossScaleOptimizer(
        keras.optimizers.SGD(0.1, momentum=0.9) if inner == "sgd" else keras.optimizers.Adagrad(0.1), dynamic_growth_steps=2
    )
    model.compile(hvd.DistributedOptimizer(optimizer), "mse", metrics=["mae"])

    def values() -> list[Any]:
        return [v.numpy().tolist() for v in [*model.variables, *model.optimizer.variables]]

    state = elastic.KerasState(model, batch=3, note="a")
    before = values()
    for commit in (False, True):
        model.fit(np.ones((8, 3)), np.ones((8, 1)), batch_size=2, verbose=0)
        state.batch, state.note = 7, "b"
        after = values()
        assert after != before
        if commit:
            state.save()
        state.restore()
        assert values() == (after if commit else before)
        assert (state.batch, state.note) == ((7, "b") if commit else (3, "a"))
    state.sync()
    assert values() == after
