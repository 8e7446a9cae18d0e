"""Several optimizers in one model, gradients that overwrite their variables, and backups.

All ranks of one job run the checks together; any number of ranks from 2.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_syncbn.keras as hvd
from hvd_syncbn.tf_impl.keras.training.optimizer import is_distributed, optimizers_of
from tests.keras_gan import Gan, Sides, built_gan
from tests.parallel.checks.keras_horovod import all_equal, shared_folder
from tests.parallel.checks.keras_state import X, Y, sgd, shard


def gan_state(gan: Gan) -> list[bytes]:
    """Weights, and the state of both optimizers."""
    values = [*gan.weights, *gan.d_optimizer.variables, *gan.sides.optimizers["g"].variables]
    return [v.numpy().tobytes() for v in values]


def resumed_gan() -> Gan:
    """Rank 0 has trained: its weights and both optimizers' momentum are not those of the others."""
    gan = built_gan(hvd.rank(), hvd.DistributedOptimizer)
    if hvd.rank() == 0:
        rng = np.random.default_rng(5)
        for optimizer in (gan.d_optimizer, gan.sides.optimizers["g"]):
            for variable in optimizer.variables[2:]:
                variable.assign(rng.normal(size=variable.shape))
            optimizer.iterations.assign(7)
    return gan


def check_several_optimizers() -> None:
    for broadcast in (
        lambda gan: gan.fit(X, batch_size=4, verbose=0, callbacks=[hvd.callbacks.BroadcastVariablesCallback()]),
        lambda gan: hvd.elastic.KerasState(gan).sync(),
        lambda gan: hvd.elastic.KerasState(gan, d=gan.d_optimizer, g=gan.sides.optimizers["g"]).sync(),
        lambda gan: hvd.broadcast_variables([gan, *optimizers_of(gan)]),
    ):
        gan = resumed_gan()
        assert not all_equal(gan_state(gan))
        broadcast(gan)
        assert all_equal(gan_state(gan))
        assert int(gan.d_optimizer.iterations) >= 7
        assert any(np.any(v.numpy()) for v in gan.d_optimizer.variables[2:])


def check_optimizers_in_keywords() -> None:
    """A loop's own, which no model holds; and layers."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    norm, optimizer = keras.layers.Normalization(), keras.optimizers.Adam(0.1 * (1 + hvd.rank()))
    norm.adapt(shard(hvd.rank()))
    optimizer.build(model.trainable_variables)
    state = hvd.elastic.KerasState(model, keras.optimizers.SGD(), second=optimizer, norm=norm, epoch=hvd.rank())
    assert state.second is optimizer and state.norm is norm
    state.sync()
    assert state.second is optimizer and state.norm is norm and state.epoch == 0
    assert all_equal((norm(X).numpy().tobytes(), float(optimizer.learning_rate.numpy())))


def check_optimizers_built_on_one_rank() -> None:
    gan = built_gan(0, hvd.DistributedOptimizer, build=hvd.rank() == 0)
    with pytest.raises(ValueError, match="on every rank first"):
        gan.fit(X, batch_size=4, verbose=0, callbacks=[hvd.callbacks.BroadcastVariablesCallback()])


def check_wrapped_after_tracing() -> None:
    """Both of a GAN's optimizers average after they were wrapped, though the step was traced before."""
    gan = built_gan(0, lambda optimizer: optimizer)
    x = X + hvd.rank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gan.fit(x, batch_size=4, verbose=0)
    assert not all_equal(gan_state(gan))
    hvd.DistributedOptimizer(gan.d_optimizer)
    hvd.DistributedOptimizer(gan.sides.optimizers["g"])
    gan.fit(x, batch_size=4, verbose=0, callbacks=[hvd.callbacks.BroadcastVariablesCallback()])
    assert all_equal(gan_state(gan))


def check_learning_rates_of_several_optimizers() -> None:
    """A callback sets the optimizer that it is given, and does not guess."""
    gan = built_gan(0, hvd.DistributedOptimizer)
    warmup = hvd.callbacks.LearningRateWarmupCallback
    with pytest.raises(ValueError, match=r"for each optimizer: LearningRateWarmupCallback\(..., optimizer=optimizer\)"):
        gan.fit(X, batch_size=4, verbose=0, callbacks=[warmup(0.5, 1)])
    unused = float(gan.optimizer.learning_rate.numpy())
    chosen = [warmup(0.5, 1, optimizer=gan.d_optimizer)]
    chosen.append(hvd.callbacks.LearningRateScheduleCallback(0.25, lambda epoch: 0.5, optimizer=gan.sides.optimizers["g"]))
    gan.fit(X, batch_size=4, verbose=0, callbacks=chosen)
    rates = [gan.d_optimizer, gan.sides.optimizers["g"], gan.optimizer]
    assert [float(one.learning_rate.numpy()) for one in rates] == [0.5, 0.125, unused]


def check_load_model_wraps_all() -> None:
    with shared_folder() as folder:
        path = folder / f"{hvd.rank()}.keras"
        gan = built_gan(0, hvd.DistributedOptimizer)
        gan.fit(X, batch_size=4, verbose=0)
        gan.save(path)
        loaded = hvd.load_model(path, custom_objects={"Gan": Gan, "Sides": Sides})
    assert is_distributed(loaded.d_optimizer) and is_distributed(loaded.sides.optimizers["g"])
    assert len(optimizers_of(loaded)) == 3  # `model.optimizer`, which nobody uses
    x = X + hvd.rank()
    loaded.fit(x, batch_size=4, verbose=0)
    assert all_equal(gan_state(loaded))


def check_multi_optimizer_of_distributed_ones() -> None:
    """Right, and no warning; some of them plain: a warning that names them; inside a LossScaleOptimizer: an error."""

    def fit(*optimizers: Any, scale: bool = False) -> keras.Model:
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        several: Any = keras.optimizers.MultiOptimizer(lambda v: optimizers["bias" in v.path])
        model.compile(keras.optimizers.LossScaleOptimizer(several) if scale else several, "mse")
        callbacks = [hvd.callbacks.BroadcastVariablesCallback()]
        model.fit(X * (1 + hvd.rank()), Y, batch_size=8, verbose=0, callbacks=callbacks)
        return model

    def plain() -> Any:
        return keras.optimizers.SGD(0.1, name="plain")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fit(sgd(0.1), sgd(0.1))
    assert all_equal([v.tobytes() for v in model.get_weights()])
    with pytest.warns(UserWarning, match=r"some of its optimizers do not average.*\['plain'\]"):
        fit(sgd(0.1), plain())
    with pytest.warns(UserWarning, match="optimizer that does not average"):
        fit(plain(), plain())
    with pytest.raises(RuntimeError, match="LossScaleOptimizer wraps a MultiOptimizer"):
        fit(sgd(0.1), sgd(0.1), scale=True)
    with pytest.raises(ValueError, match="already"):
        hvd.DistributedOptimizer(model.optimizer)


class Interrupted(Exception):
    pass


class Interrupt(keras.callbacks.Callback):
    """Ends fit() in an epoch, before a batch, on all ranks."""

    def __init__(self, epoch: int, batch: int) -> None:
        super().__init__()
        self.at, self.epoch = (epoch, batch), -1
        self.epochs: list[int] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch
        self.epochs.append(epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if (self.epoch, batch) == self.at:
            raise Interrupted


def trained(make: Callable[[], Any], interrupt: tuple[int, int], **kwargs: Any) -> tuple[list[int], list[bytes]]:
    """A model of this rank's own weights and data; the epochs that it sees, and its state."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Normalization(), keras.layers.Dense(1)])
    rng = np.random.default_rng(hvd.rank())
    model.layers[-1].set_weights([rng.normal(size=w.shape) for w in model.layers[-1].get_weights()])
    model.layers[0].adapt(shard(hvd.rank()))
    model.compile(sgd(0.1), "mse")
    last = Interrupt(*interrupt)
    x = X * (1 + hvd.rank())
    callbacks = [hvd.callbacks.BroadcastVariablesCallback(), make(), last]
    with contextlib.suppress(Interrupted):
        model.fit(x, Y, batch_size=2, verbose=0, epochs=5, shuffle=False, callbacks=callbacks, **kwargs)
    state = [v.numpy().tobytes() for v in [*model.weights, *model.optimizer.variables]]
    return last.epochs, [*state, model.layers[0].mean.numpy().tobytes()]


def check_backup() -> None:
    """Interrupted and resumed gives the bytes of a training that was not; all ranks in one epoch; rank 0 alone writes."""
    never = (-1, 0)
    for case, save_freq, kwargs, epochs in (
        ("epochs", "epoch", {}, [3, 4]),
        ("initial", "epoch", {"initial_epoch": 1}, [3, 4]),
    ):
        with shared_folder() as folder:
            path = folder / f"{case}{hvd.rank()}"  # the others' stays empty

            def make(path: Path = path, save_freq: Any = save_freq) -> Any:
                return hvd.callbacks.BackupAndRestore(path, save_freq)

            _, expected = trained(make, never, **kwargs)
            assert not path.exists()
            trained(make, (3, 2), **kwargs)
            assert path.exists() == (hvd.rank() == 0)
            seen, state = trained(make, never, **kwargs)
            assert seen == epochs, seen
            assert state == expected and all_equal(state)
            assert not path.exists()


def check_backup_in_steps() -> None:
    """As in Keras: from the beginning of the epoch of the backup, with the state of the step."""
    for initial, save_freq, interrupt, epochs in (
        (2, 3, (2, 3), [2, 3, 4]),  # the backup is of the first epoch here, of 4 steps
        (0, 3, (0, 3), [0, 1, 2, 3, 4]),
    ):
        with shared_folder() as folder:
            made = lambda folder=folder, save_freq=save_freq: hvd.callbacks.BackupAndRestore(folder / "b", save_freq)  # noqa: E731
            trained(made, interrupt, initial_epoch=initial)
            seen, state = trained(made, (-1, 0), initial_epoch=initial)
            assert seen == epochs, (seen, epochs)
            assert all_equal(state)


def check_backup_that_cannot_be_read() -> None:
    with shared_folder() as folder:
        kept = folder / "kept"
        make = lambda: hvd.callbacks.BackupAndRestore(kept, double_checkpoint=True, delete_checkpoint=False)  # noqa: E731
        trained(make, (3, 2))
        if hvd.rank() == 0:
            (kept / "latest.weights.h5").write_bytes(b"cut short")
        hvd.allgather_object(None)
        seen, state = trained(make, (-1, 0))  # the backup before
        assert seen == [2, 3, 4] and all_equal(state)
        if hvd.rank() == 0:
            for name in ("latest.weights.h5", "latest.weights.h5.bkp"):
                (kept / name).write_bytes(b"cut short")
        hvd.allgather_object(None)
        with pytest.raises(RuntimeError, match=r"not restored. Received: by rank: \{0: "):
            trained(make, (-1, 0))
    with shared_folder() as folder, pytest.raises(ValueError, match=r"model.d_optimizer.build\(variables\)"):
        gan = built_gan(0, hvd.DistributedOptimizer, build=False)
        gan.fit(X, batch_size=4, verbose=0, callbacks=[hvd.callbacks.BackupAndRestore(folder / "gan")])


def check_backup_then_another_fit() -> None:
    """The epoch that a backup has set is forgotten with it."""
    with shared_folder() as folder:
        make = lambda: hvd.callbacks.BackupAndRestore(folder / "b")  # noqa: E731
        trained(make, (3, 2))
        model = keras.Sequential([keras.Input((3,)), keras.layers.Normalization(), keras.layers.Dense(1)])
        model.compile(sgd(0.1), "mse")
        for expected in ([3, 4], [0, 1, 2, 3, 4]):
            history = model.fit(X, Y, batch_size=2, verbose=0, epochs=5, callbacks=[make()])
            assert history.epoch == expected


def check_plain_backup_is_refused() -> None:
    """Keras's own: on one rank, or on all with one folder."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(sgd(), "mse")
    plain = keras.callbacks.BackupAndRestore
    broadcast = hvd.callbacks.BroadcastVariablesCallback()
    with shared_folder() as folder:
        for callbacks in ([plain(folder / "a")] if hvd.rank() == 0 else [], [plain(folder / "b")]):
            for order in itertools.permutations([broadcast, *callbacks]):
                with pytest.raises(ValueError, match=r"hvd_syncbn.keras.callbacks.BackupAndRestore` on all ranks. Received"):
                    model.fit(X, Y, verbose=0, callbacks=list(order))
                if not callbacks:  # as many times as rank 0 does
                    with pytest.raises(ValueError, match=r"on all ranks\. Received"):
                        model.fit(X, Y, verbose=0, callbacks=[broadcast])
        model.fit(X, Y, verbose=0, callbacks=[broadcast, plain(folder / str(hvd.rank()))])


def check_float8() -> None:
    """Scales and largest inputs are the maximum over ranks and over the batches of an update, of a local layer this rank's."""

    def overwritten() -> Any:
        variable = keras.Variable(np.zeros(2), dtype="float32")
        variable.overwrite_with_gradient = True
        return variable

    rank, size = hvd.rank(), hvd.size()
    batches = [[1.0 + rank, 9.0 - rank], [0.5, 2.0]]
    for passes, (make, local) in itertools.product((1, 2), ((hvd.DistributedOptimizer, False), (partial, True))):
        variables = [overwritten(), keras.Variable(np.zeros(2), dtype="float32"), overwritten()]
        optimizer = make(keras.optimizers.SGD(1.0), backward_passes_per_step=passes)
        if local:
            optimizer.register_local_var(variables[2])
        for gradient in batches[:passes]:
            optimizer.apply([tf.constant(gradient)] * 3, variables)
        everyone, own = [float(size), 9.0], [1.0 + rank, 9.0 - rank]
        assert variables[0].numpy().tolist() == everyone
        assert variables[2].numpy().tolist() == (own if local else everyone)
        assert variables[1].numpy().tolist() != everyone
    with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
        loss = tf.reduce_sum(variables[0] * tf.constant(batches[0]))
    assert tape.gradient(loss, variables[:1])[0].numpy().tolist() == everyone

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    model.quantize("float8")
    model.compile(sgd(0.01), "mse")
    callbacks = [hvd.callbacks.BroadcastVariablesCallback()]
    model.fit(X * (1 + rank), Y, batch_size=4, shuffle=False, verbose=0, epochs=2, callbacks=callbacks)
    assert all_equal([v.tobytes() for v in model.get_weights()])
    history = model.layers[0].inputs_amax_history.numpy()
    assert float(history[0]) == float(np.abs(X[4:] * hvd.size()).max())


def partial(optimizer: Any, **options: Any) -> Any:
    return hvd.PartialDistributedOptimizer(optimizer, **options)
