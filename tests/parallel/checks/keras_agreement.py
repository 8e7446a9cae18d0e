"""What ranks decide together and have to hold alike, on two ranks: `MetricAverageCallback`, `check_ranks_agree`."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_syncbn.keras as hvd
from tests.parallel.checks.keras_horovod import (
    BATCH,
    FEATURES,
    MSE,
    all_equal,
    digest,
    fit,
    make_data,
    make_model,
    shared_folder,
)

callbacks = keras.callbacks


def compiled(seed: int = 7, optimizer: Any = None) -> keras.Model:
    model = make_model(seed)
    model.compile(optimizer=optimizer or hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), loss=MSE)
    return model


def mine() -> tuple[np.ndarray, np.ndarray]:
    x, y = make_data()
    return x[:, hvd.rank()], y[:, hvd.rank()]


def train(model: keras.Model, *others: Any, before: Any = (), epochs: int = 4, data: Any = None, **options: Any) -> Any:
    """Fit with the averaging callback, and callbacks before and after it."""
    return fit(model, *(data or mine()), BATCH, epochs, callbacks=[*before, hvd.MetricAverageCallback(), *others], **options)


def on_rank(rank: int, *those: Any) -> tuple[Any, ...]:
    return those if hvd.rank() == rank else ()


def error_of(expected: type[Exception], *args: Any, **options: Any) -> str:
    """The error of a training, the same on every rank."""
    with pytest.raises(expected) as caught:
        train(*args, **options)
    assert all_equal(str(caught.value)), str(caught.value)
    return str(caught.value)


class Losses(callbacks.Callback):
    """Logs a loss of each rank's own, before it is averaged."""

    def __init__(self, *by_epoch: float) -> None:
        super().__init__()
        self.by_epoch = by_epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs["val_loss"] = self.by_epoch[epoch]


def check_callbacks_that_decide_come_after() -> None:
    for make in (
        lambda: callbacks.EarlyStopping(monitor="loss"),
        lambda: callbacks.ReduceLROnPlateau(monitor="loss"),
        lambda: callbacks.ModelCheckpoint("unused.keras", monitor="loss", save_best_only=True),
        lambda: hvd.callbacks.BestModelCheckpoint(monitor="loss", filepath="unused.keras"),
    ):
        name = type(make()).__name__
        error = error_of(ValueError, compiled(), before=[make()])
        assert f"Received: before it, by rank: [['{name}'], ['{name}']]. Put" in error, error
        error = error_of(ValueError, compiled(), before=on_rank(1, make()))
        assert f"by rank: [[], ['{name}']]" in error, error
    with shared_folder() as folder:
        keeps_all = callbacks.ModelCheckpoint(folder / f"{hvd.rank()}.keras")
        train(compiled(), before=[keeps_all, callbacks.CSVLogger(folder / f"{hvd.rank()}.csv")], epochs=1)


def check_decisions_are_those_of_all_ranks() -> None:
    """Each rank's own loss says something else than their mean: stopping, rate, best weights and best file follow the mean."""
    losses = ((4.0, 1.0, 3.0, 5.0, 6.0), (4.0, 6.0, 0.0, 5.0, 6.0))[hvd.rank()]  # means: 4, 3.5, 1.5, 5, 6
    with shared_folder() as folder:
        path = folder / f"{hvd.rank()}.weights.h5"
        model = compiled()
        history = train(
            model,
            callbacks.ReduceLROnPlateau(monitor="val_loss", patience=1, factor=0.5),
            callbacks.EarlyStopping(monitor="val_loss", patience=2, restore_best_weights=True),
            callbacks.ModelCheckpoint(path, monitor="val_loss", save_best_only=True, save_weights_only=True),
            before=[Losses(*losses)],
            epochs=5,
        )
        assert history.history["val_loss"] == [4.0, 3.5, 1.5, 5.0, 6.0]
        assert all_equal(digest(model)) and float(model.optimizer.learning_rate.numpy()) == np.float32(0.01) / 4
        saved = make_model()
        saved.load_weights(path)
        third = compiled()
        train(third, epochs=3)
        for a, b, c in zip(saved.get_weights(), model.get_weights(), third.get_weights(), strict=True):
            assert a.tobytes() == b.tobytes() == c.tobytes()


def check_one_rank_stops() -> None:
    """All stop after the same epoch, and say which rank wanted it."""

    class Stop(callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.stop_training = epoch == 1

    for rank, make in (
        (0, lambda: callbacks.EarlyStopping(monitor="loss", min_delta=1e6, patience=1)),
        (1, Stop),
    ):
        model = compiled()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = train(model, *on_rank(rank, make()), epochs=8)
        assert history.epoch == [0, 1]
        assert all_equal(digest(model))
        said = [str(w.message) for w in caught if "stop_training" in str(w.message)]
        assert len(said) == 1 and "at the end of epoch 1, because" in said[0] and f"on ranks [{rank}] only" in said[0], said
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert train(compiled(), Stop()).epoch == [0, 1]


def check_nan_on_one_rank() -> None:
    """Both ranks stop at the batch where one sees it, whichever rank has the callback."""
    x, y = mine()
    if hvd.rank() == 1:
        y = y.copy()
        y[2] = np.nan
    for everywhere in (True, False):
        seen: list[int] = []
        count = callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs, seen=seen: seen.append(batch))
        model = compiled()
        nan = callbacks.TerminateOnNaN()
        train(model, *([nan] if everywhere else on_rank(1, nan)), count, data=(x, y))
        assert seen == [0, 1, 2], seen
        assert all_equal(int(model.optimizer.iterations))


def check_ranks_in_different_epochs() -> None:
    error = error_of(RuntimeError, compiled(), epochs=5, initial_epoch=3 * hvd.rank())
    assert "Received: by rank: ['the start of epoch 0', 'the start of epoch 3']. Call `fit()` with the same " in error
    error = error_of(RuntimeError, compiled(), epochs=1 + hvd.rank())
    assert "Received: by rank: ['the end of fit()', 'the start of epoch 1']" in error
    error = error_of(RuntimeError, compiled(), epochs=1, initial_epoch=hvd.rank())
    assert "Received: by rank: ['the start of epoch 0', 'the end of fit()']" in error


def check_learning_rates() -> None:
    plateau = callbacks.ReduceLROnPlateau(monitor="loss", patience=1, factor=0.1, min_delta=1e6)
    error = error_of(RuntimeError, compiled(), *on_rank(0, plateau))
    assert "learning rate 'adam" in error and "Received: 0.0009999999 on rank 0; 0.01 on rank 1." in error, error
    scheduler = callbacks.LearningRateScheduler(lambda epoch, rate: rate * (1 + hvd.rank()))
    error = error_of(RuntimeError, compiled(), scheduler)
    assert "learning rate 'adam" in error and "Average the metric first" in error


def check_weights() -> None:
    restores = callbacks.EarlyStopping(monitor="val_loss", patience=9, restore_best_weights=True)
    error = error_of(RuntimeError, compiled(), *on_rank(1, restores), before=[Losses(3, 1, 2, 2)])
    assert (
        "weight 'sequential" in error and "restore_best_weights" in error and "rank 1 differs from rank 0 by up to" in error
    ), error
    error = error_of(RuntimeError, compiled(seed=hvd.rank()))
    assert "weight 'sequential" in error and "initial values were not broadcast" in error, error
    error = error_of(RuntimeError, compiled(optimizer=keras.optimizers.SGD(0.1)))
    assert "weight 'sequential" in error and "does not average gradients" in error, error


def check_what_is_each_ranks_own() -> None:
    """Seeds, metrics, states, local norms and local variables are no drift."""
    keras.utils.set_random_seed(hvd.rank())
    local, kept = keras.layers.Dense(3), keras.layers.Dense(2, bias_initializer="random_normal")
    layers = [
        keras.Input((FEATURES,), batch_size=BATCH),
        keras.layers.Reshape((FEATURES, 1)),
        keras.layers.LSTM(3, stateful=True),
        keras.layers.BatchNormalization(),
        local,
        keras.layers.Dropout(0.5),
        keras.layers.GaussianNoise(0.1),
        kept,
        hvd.SyncBatchNormalization(),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential(layers)
    optimizer = hvd.PartialDistributedOptimizer(keras.optimizers.Adam(0.1), local_layers=[local])
    model.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
    broadcast = hvd.BroadcastVariablesCallback(local_variables=[*local.variables, kept.bias])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*drifted")
        train(model, before=[broadcast], epochs=2)
    assert not all_equal(local.kernel.numpy().tobytes()) and not all_equal(kept.bias.numpy().tobytes())
    hvd.check_ranks_agree(model, local=[kept.bias])
    with pytest.raises(RuntimeError, match=r"weight '.*bias'"):
        hvd.check_ranks_agree(model)


def check_process_sets() -> None:
    """Two trainings in one job: each agrees inside; statistics of norms in groups likewise."""
    ours = [hvd.add_process_set([rank]) for rank in range(hvd.size())][hvd.rank()]
    model = make_model(seed=hvd.rank())
    model.compile(optimizer=hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), process_set=ours), loss=MSE)
    hvd.check_ranks_agree(model)
    fit(model, *mine(), BATCH, 1 + hvd.rank(), callbacks=[hvd.MetricAverageCallback(ours)])
    grouped = keras.Sequential([keras.Input((FEATURES,)), hvd.SyncBatchNormalization(process_set=ours)])
    grouped(mine()[0].reshape(-1, FEATURES), training=True)
    hvd.check_ranks_agree(grouped)
    hvd.allgather_object(None)


def check_layer_state() -> None:
    """What a layer was adapted to is compared, though no weight differs."""
    rank = hvd.rank()
    for layer, data, name in (
        (keras.layers.Normalization(), np.arange(10.0).reshape(5, 2) * (1 + rank), "mean"),
        (keras.layers.Discretization(num_bins=3), np.arange(10.0) * (1 + rank), "bin_boundaries"),
        (keras.layers.StringLookup(), np.array(["a", "b", "c"][: 2 + rank]), "vocabulary"),
        (keras.layers.IntegerLookup(), np.array([1, 2, 3][: 2 + rank]), "vocabulary"),
        (keras.layers.TextVectorization(), np.array(["to be", "or not"][: 1 + rank]), "vocabulary"),
    ):
        layer.adapt(data)
        model = keras.Sequential([layer])
        with pytest.raises(RuntimeError, match=r"layer state '.*'.* adapted the layer to different data") as caught:
            hvd.check_ranks_agree(model)
        assert type(layer).__name__.lower()[:6] in str(caught.value).replace("_", ""), caught.value
        assert all_equal(str(caught.value)) and name in str(caught.value)
        hvd.check_ranks_agree(model, local=[layer])
        layer.adapt(data[:2] / (1 + rank) if data.dtype == float else data[:1])
        hvd.check_ranks_agree(model)
    stale = keras.layers.Normalization()
    stale.adapt(np.arange(10.0).reshape(5, 2) * (1 + rank))
    for variable in stale.variables:
        variable.assign(tf.zeros_like(variable))
    with pytest.raises(RuntimeError, match=r"layer state 'normalization.*\.mean'"):  # constants that nobody has made anew
        hvd.check_ranks_agree(keras.Sequential([stale]))


def check_each_kind() -> None:
    """The first thing that differs is named."""
    rank = hvd.rank()

    class Counter(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.count = self.add_weight(shape=(2,), initializer="zeros", trainable=False, name="count")

        def call(self, x: Any) -> Any:
            return x

    layers = [keras.layers.Dense(4), hvd.SyncBatchNormalization(), Counter(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((FEATURES,)), *layers])
    model.set_weights([np.full(w.shape, 0.5) for w in model.get_weights()])
    model.compile(optimizer=hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), loss="mse")
    model.second = keras.optimizers.SGD(0.5, momentum=0.5)
    model.second.build(model.trainable_variables)
    layers[3].trainable = False
    train(model, epochs=1)
    hvd.check_ranks_agree(model)
    for variable, expected in (
        (layers[0].kernel, "weight 'sequential"),
        (layers[3].kernel, "weight 'sequential"),  # frozen
        (layers[1].moving_variance, "running statistics 'sequential"),
        (layers[2].count, "buffer 'sequential"),
        (model.optimizer.variables[-1], "optimizer state 'adam"),
        (model.optimizer.iterations, "optimizer state 'adam"),
        (model.second.variables[-1], "optimizer state 'sgd"),
        (model.second.learning_rate, "learning rate 'sgd"),
    ):
        before = variable.numpy()
        variable.assign(before + rank)
        with pytest.raises(RuntimeError) as raised:
            hvd.check_ranks_agree(model)
        assert all_equal(str(raised.value)) and f"apart: {expected}" in str(raised.value), raised.value
        variable.assign(before)
        hvd.check_ranks_agree(model)
    model = compiled()
    with pytest.raises(RuntimeError, match="This may be rounding"):
        kernel = model.layers[0].kernel
        kernel.assign(kernel * (1 + 1e-12 * rank))
        hvd.check_ranks_agree(model)
    # A job goes on with that, and says it once.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, epochs=3)
    assert len([w for w in caught if "may be rounding" in str(w.message)]) == 1
    with pytest.raises(TypeError, match=r"layers and variables in `local`. Received: str"):
        hvd.check_ranks_agree(model, local=["dense"])
    with pytest.raises(TypeError, match=r"a Keras 3 model or layer. Received: builtins\.str"):
        hvd.check_ranks_agree("model")
    with pytest.raises(TypeError, match=r"a list of them. Received: str"):
        hvd.check_ranks_agree(model, ["sgd"])
