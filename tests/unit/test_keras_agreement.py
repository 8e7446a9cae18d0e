"""`MetricAverageCallback` and `check_ranks_agree` of Keras on one rank: nothing to agree on, nothing in the way."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytest.importorskip("horovod.tensorflow")

import horovod.tensorflow as hvd
import keras
import numpy as np

from hvd_syncbn import drift as core
from hvd_syncbn.keras import DistributedOptimizer, MetricAverageCallback, SyncBatchNormalization, check_ranks_agree
from hvd_syncbn.tf_impl.keras.training import drift

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def horovod() -> None:
    hvd.init()


def compiled() -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), SyncBatchNormalization(), keras.layers.Dense(1)])
    model.compile(optimizer=DistributedOptimizer(keras.optimizers.Adam(0.01)), loss="mse")
    return model


X, Y = np.arange(12.0).reshape(4, 3), np.ones((4, 1))


class Counting(MetricAverageCallback):
    """A user's own, whose `set_model` is one call further away from Keras."""

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)


@pytest.mark.parametrize("make", [MetricAverageCallback, Counting])
def test_any_order_and_several_fits(make: Any) -> None:
    model, average = compiled(), make()
    stop = keras.callbacks.EarlyStopping(monitor="loss", min_delta=1e6, patience=1, restore_best_weights=True)
    callbacks = [stop, keras.callbacks.TerminateOnNaN(), average]
    for _ in range(2):
        history = model.fit(X, Y, epochs=5, verbose=0, callbacks=callbacks)
        assert history.epoch == [0, 1]
    assert callbacks == [stop, callbacks[1], average]
    model.evaluate(X, Y, verbose=0, callbacks=[average])


def test_list_that_is_used_again() -> None:
    model = compiled()
    callbacks = keras.callbacks.CallbackList([MetricAverageCallback()], add_history=True, model=model)
    for _ in range(2):
        callbacks.set_model(model)
        model.fit(X, Y, epochs=1, verbose=0, callbacks=callbacks)
    assert len(callbacks.callbacks) == 3  # ours, the history, and ours after all others


def test_check_ranks_agree_alone() -> None:
    model = compiled()
    check_ranks_agree(model)
    check_ranks_agree(model, model.optimizer, local=[model.layers[0], model.layers[1].kernel])
    check_ranks_agree(model, [model.optimizer])
    with pytest.raises(TypeError, match=r"Received: builtins\.list"):
        check_ranks_agree([])


def test_everything_is_listed_once() -> None:
    model = compiled()
    model.fit(X, Y, verbose=0)
    entries = list(drift._entries(model, [model.optimizer], set()))
    kinds = [entry.kind for entry in entries]
    assert kinds == sorted(kinds, key=list(core.CAUSES).index), "what causes differences comes first"
    assert len(entries) == len(model.weights) + len(model.optimizer.variables)
    assert [kinds.count(kind) for kind in (core.LEARNING_RATE, core.WEIGHT, core.STATISTICS)] == [1, 4, 2]


def test_bfloat16_is_compared_exactly() -> None:
    variable = keras.Variable(np.float32([1.0, 1.0078125]), dtype="bfloat16")
    assert drift._value(variable).tolist() == [1.0, 1.0078125]


def test_cost() -> None:
    """For 25 million numbers, in seconds of one core: 5 ms, where it is not the first time that memory is touched."""
    dense = keras.layers.Dense(5000)
    dense.build((None, 5000))
    model = keras.Sequential([dense])
    list(map(core.digest, (entry.value for entry in drift._entries(model, [], set()))))
    start = time.process_time()
    list(map(core.digest, (entry.value for entry in drift._entries(model, [], set()))))
    assert time.process_time() - start < 0.1
