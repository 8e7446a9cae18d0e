"""State that is more than a model's weights and one optimizer: layers' constants and vocabularies, several optimizers, backups.

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
from hvd_syncbn.tf_impl.keras.optimizer import is_distributed, optimizers_of
from tests.keras_gan import Gan, Sides, built_gan
from tests.parallel.checks_keras_horovod import all_equal, shared_folder

X = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")
Y = X.sum(1, keepdims=True)
WORDS = [["a b c a", "b d"], ["x y x", "y y a z"]]  # by rank


def sgd(rate: float = 0.0) -> Any:
    return hvd.DistributedOptimizer(keras.optimizers.SGD(rate, momentum=0.9))


def shard(rank: int) -> np.ndarray:
    """What a rank adapts to."""
    return (np.random.default_rng(rank).normal(size=(20, 3)) * (1 + 3 * rank) + rank).astype("float32")


def adapted_model(rank: int) -> keras.Model:
    """A Normalization inside of a nested model, adapted to a rank's own data."""
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Normalization(), keras.layers.Dense(2, "tanh")])
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inner(inputs)))
    rng = np.random.default_rng(3)
    for dense in (inner.layers[1], model.layers[-1]):
        dense.set_weights([rng.normal(size=w.shape) for w in dense.get_weights()])
    inner.layers[0].adapt(shard(rank))
    return model


def fitted_loss(model: keras.Model, callbacks: list[Any] | None = None) -> bytes:
    """The loss of the same samples on every rank, from the training function."""
    history = model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=callbacks).history
    return np.float64(history["loss"][0]).tobytes()


def seen_by(model: keras.Model) -> tuple[bytes, bytes, bytes]:
    return model.predict(X, verbose=0).tobytes(), np.float64(model.evaluate(X, Y, verbose=0)).tobytes(), fitted_loss(model)


def check_normalization() -> None:
    """By every path, with steps that were traced before: all ranks see what rank 0 does."""
    reference = adapted_model(0)
    reference.compile(sgd(), "mse")
    expected = seen_by(reference)

    def callback(model: keras.Model) -> None:
        fitted_loss(model, [hvd.callbacks.BroadcastVariablesCallback()])

    def sync(model: keras.Model) -> None:
        hvd.elastic.KerasState(model).sync()

    for broadcast in (callback, hvd.broadcast_variables, sync):
        model = adapted_model(hvd.rank())
        model.compile(sgd(), "mse")
        assert not all_equal(seen_by(model))
        broadcast(model)
        assert seen_by(model) == expected
    # Adapted again after the step was traced: alike on the rank that has nothing to take.
    model.layers[1].layers[0].adapt(shard(hvd.rank() + 2))
    expected = hvd.broadcast_object(seen_by_new(model))
    callback(model)
    assert seen_by(model) == expected


def seen_by_new(model: keras.Model) -> tuple[bytes, bytes, bytes]:
    """What a model does that has traced nothing yet; the ranks' training functions meet in it."""
    model.compile(sgd(), "mse")
    return seen_by(model)


def check_resumed_as_in_the_template() -> None:
    """Rank 0 reads a checkpoint, the others get it by `KerasState.sync`."""
    with shared_folder() as folder:
        if hvd.rank() == 0:
            adapted_model(5).save_weights(folder / "checkpoint.weights.h5")
        reference, model = adapted_model(5), adapted_model(hvd.rank())
        for one in (reference, model):
            one.compile(sgd(), "mse")
        expected = seen_by(reference)
        state = hvd.elastic.KerasState(model, epoch=0)
        if hvd.rank() == 0:
            model.load_weights(folder / "checkpoint.weights.h5")
            state.epoch = 3
        state.save()
        state.sync()
    assert state.epoch == 3
    assert seen_by(model) == expected


def check_normalization_restored() -> None:
    """An elastic state that goes back, and forward to another rank's."""
    model = adapted_model(hvd.rank())
    model.compile(sgd(), "mse")
    before = seen_by(model)
    state = hvd.elastic.KerasState(model)
    model.layers[1].layers[0].adapt(shard(7))
    assert seen_by_new(model) != before
    state.restore()
    assert seen_by(model) == before
    state.sync()
    assert all_equal(seen_by(model))


def check_normalization_in_a_model_that_data_builds() -> None:
    class Late(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.dense = keras.layers.Normalization(), keras.layers.Dense(1, kernel_initializer="ones")
            self.norm.adapt(shard(hvd.rank()))

        def call(self, x: Any) -> Any:
            return self.dense(self.norm(x))

    model = Late()
    model.compile(sgd(), "mse")
    assert all_equal(fitted_loss(model, [hvd.callbacks.BroadcastVariablesCallback()]))
    assert all_equal(seen_by(model))


def check_normalization_from_variables_alone() -> None:
    """Variables do not bring their layer: an error on every rank where that makes a difference."""
    model = adapted_model(hvd.rank())
    with pytest.raises(ValueError, match=r"broadcast_variables\(model\).*Received: variables of \[.*normalization"):
        hvd.broadcast_variables(model.variables)
    hvd.broadcast_variables(model)
    hvd.broadcast_variables(model.variables)
    with pytest.raises(ValueError, match="on every rank first"):
        normalization = keras.layers.Normalization()
        if hvd.rank() == 0:
            normalization.adapt(X)
        hvd.broadcast_variables(normalization)


def lookups(rank: int) -> dict[str, Any]:
    """Layers with a vocabulary or bins, adapted to a rank's own data."""
    words, numbers = WORDS[rank % 2], [[3, 1, 3], [5, 1, 5, 9]][rank % 2]
    tokens = [word for line in words for word in line.split()]
    made = {
        "int": (keras.layers.StringLookup(), tokens),
        "inverted": (keras.layers.StringLookup(invert=True), tokens),
        "multi_hot": (keras.layers.StringLookup(output_mode="multi_hot", max_tokens=9, pad_to_max_tokens=True), tokens),
        "tf_idf": (
            keras.layers.StringLookup(output_mode="tf_idf", max_tokens=9, pad_to_max_tokens=True, num_oov_indices=2),
            tf.ragged.constant([line.split() for line in words]),
        ),
        "integers": (keras.layers.IntegerLookup(mask_token=0), numbers),
        "text": (keras.layers.TextVectorization(), words),
        "text_idf": (keras.layers.TextVectorization(output_mode="tf_idf", max_tokens=9, pad_to_max_tokens=True), words),
        "bins": (keras.layers.Discretization(num_bins=3), np.asarray(numbers, "float32")),
    }
    for layer, data in made.values():
        layer.adapt(data)
    given = [["p", "q"], ["q", "r", "s"]][rank % 2]
    return {name: layer for name, (layer, _) in made.items()} | {"given": keras.layers.StringLookup(vocabulary=given)}


def mapped(layers: dict[str, Any]) -> dict[str, Any]:
    lines = tf.constant([line for lines in WORDS for line in lines])
    tokens = tf.constant(["a", "x", "d", "q", "r", "?"])
    inputs = {
        "integers": tf.constant([1, 3, 5, 9, 0]),
        "bins": tf.constant([0.0, 2.0, 4.0, 6.0]),
        "text": lines,
        "text_idf": lines,
    }
    inputs["inverted"] = tf.range(1, 6, dtype="int64")
    return {name: np.asarray(layer(inputs.get(name, tokens))).tolist() for name, layer in layers.items()}


def check_vocabularies() -> None:
    """Outside of a model: handed in one by one, and as a list; also to layers that have none yet. Names may differ."""
    if hvd.rank() == 1:
        lookups(0)  # Keras counts on
    expected = mapped(lookups(0))
    layers = lookups(hvd.rank())
    assert not all_equal(mapped(layers))
    hvd.broadcast_variables(list(layers.values()))
    assert mapped(layers) == expected
    assert all_equal([*layers["given"].get_config()["vocabulary"]])  # a file of any rank is right
    for layer in lookups(hvd.rank()).values():
        hvd.broadcast_variables(layer, root_rank=1)
    if hvd.rank() == 1:
        keras.layers.Normalization()
    norm = keras.layers.Normalization()
    norm.adapt(shard(hvd.rank()))
    hvd.broadcast_variables(norm)
    assert all_equal(norm(X).numpy().tobytes())
    fresh: Any = keras.layers.StringLookup()
    if hvd.rank() == 0:
        fresh.adapt(["m", "n", "n"])
    hvd.broadcast_variables(fresh)
    assert fresh.get_vocabulary() == ["[UNK]", "n", "m"]
    other: Any = keras.layers.StringLookup(name="words")
    if hvd.rank() == 1:
        other.adapt(["m"])
    with pytest.raises(ValueError, match=r"not broadcast.*rank.*1: .*layer 'words'.*adapt"):
        hvd.broadcast_variables(other)
    with pytest.raises(ValueError, match="same layers"):
        hvd.broadcast_variables([keras.layers.StringLookup() if hvd.rank() == 0 else keras.layers.Discretization(num_bins=2)])


def text_model(rank: int) -> keras.Model:
    vectors = keras.layers.TextVectorization(max_tokens=9, output_sequence_length=3)
    vectors.adapt(WORDS[rank % 2])
    inputs = keras.Input((1,), dtype="string")
    embedded = keras.layers.Embedding(9, 2)(vectors(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(embedded)))
    rng = np.random.default_rng(3)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    return model


def check_vocabulary_in_a_model() -> None:
    """A step that was traced before the broadcast uses the new table; an elastic state keeps and restores it."""
    lines = tf.constant([[line] for lines in WORDS for line in lines])
    y = np.ones((4, 1))

    def seen(model: keras.Model, callbacks: list[Any] | None = None) -> list[float]:
        history = model.fit(lines, y, batch_size=4, shuffle=False, verbose=0, callbacks=callbacks).history["loss"]
        return [*history, *model.predict(lines, verbose=0).ravel().tolist()]

    def compiled(rank: int) -> keras.Model:
        model = text_model(rank)
        model.compile(sgd(), "mse")
        return model

    expected = seen(compiled(0))
    model = compiled(hvd.rank())
    assert not all_equal(seen(model))
    assert seen(model, [hvd.callbacks.BroadcastVariablesCallback()]) == expected
    model = compiled(hvd.rank())
    seen(model)
    state = hvd.elastic.KerasState(model)
    state.sync()
    assert seen(model) == expected
    model.layers[1].set_vocabulary(["z"])
    seen(model)
    state.restore()
    assert seen(model) == expected


def check_feature_space() -> None:
    """Keras's collection of preprocessing layers."""
    features = {"number": "float_normalized", "word": "string_categorical"}
    space = keras.utils.FeatureSpace(features=features, output_mode="dict")
    tokens = WORDS[hvd.rank() % 2][0].split()[:3]
    data = {"number": shard(hvd.rank())[:3, :1], "word": np.asarray(tokens)[:, None]}
    space.adapt(tf.data.Dataset.from_tensor_slices(data))

    def seen() -> Any:
        out = space({"number": tf.constant([[1.0], [2.0]]), "word": tf.constant([["a"], ["x"]])})
        return {name: np.asarray(value).tolist() for name, value in out.items()}

    number = seen()["number"]
    assert not all_equal(number)
    hvd.broadcast_variables(space)
    assert all_equal(seen())


class Written(keras.layers.Layer):
    """State in an asset, in a store, and in a variable that Keras does not know."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.offset, self.raw = text, np.zeros(2), tf.Variable(float(len(text)))

    def save_own_variables(self, store: Any) -> None:
        store["offset"] = self.offset

    def load_own_variables(self, store: Any) -> None:
        self.offset = np.asarray(store["offset"])

    def save_assets(self, dir_path: str) -> None:
        Path(dir_path, "deep").mkdir()
        Path(dir_path, "deep", "text").write_text(self.text)

    def load_assets(self, dir_path: str) -> None:
        self.text = Path(dir_path, "deep", "text").read_text()

    def call(self, x: Any) -> Any:
        return x


class Finalized(keras.layers.Layer):
    """Constants made of variables."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(), initializer="ones", trainable=False)
        self.finalize_state()

    def finalize_state(self) -> None:
        self.constant = tf.convert_to_tensor(self.scale) * 2

    def call(self, x: Any) -> Any:
        return x * self.constant


class Adapting(keras.layers.Layer):
    """State that nobody else knows how to get."""

    def adapt(self, data: Any) -> None:
        self.table = tf.lookup.experimental.MutableHashTable("string", "int64", 0)
        self.table.insert(tf.constant(list(data)), tf.range(len(data), dtype="int64"))

    def call(self, x: Any) -> Any:
        return x


def check_custom_layers() -> None:
    written, finalized = Written("ab" * (1 + hvd.rank())), Finalized()
    written.offset = written.offset + hvd.rank()
    finalized.build((None, 2))
    finalized.scale.assign(3.0 + hvd.rank())
    model = keras.Sequential([keras.Input((2,)), written, finalized])
    hvd.broadcast_variables(model)
    assert (written.text, written.offset.tolist(), float(written.raw.numpy())) == ("abab"[:2], [0.0, 0.0], 2.0)
    assert float(finalized.constant) == 6.0
    state = hvd.elastic.KerasState(model, optimizer=keras.optimizers.SGD())
    written.text, written.offset = "other", np.ones(2)
    finalized.scale.assign(9.0)
    finalized.finalize_state()
    state.restore()
    assert (written.text, written.offset.tolist(), float(finalized.constant)) == ("ab", [0.0, 0.0], 6.0)

    adapting = Adapting(name="unknown")
    adapting.adapt(["a", "b"] if hvd.rank() == 0 else ["b", "a"])
    with pytest.raises(ValueError, match=r"cannot be broadcast.*Received: \['unknown.table'\]"):
        hvd.broadcast_variables(keras.Sequential([keras.Input((2,)), adapting]))
    given = keras.layers.Normalization(mean=float(hvd.rank()), variance=1.0, name="given")
    with pytest.raises(ValueError, match=r"cannot be broadcast.*given.mean"):
        hvd.broadcast_variables(keras.Sequential([keras.Input((2,)), given]))
    adapting.adapt(["a", "b"])
    finalized.other = tf.constant([float(hvd.rank())])
    with pytest.warns(UserWarning, match=r"differ between ranks.*finalized.other"):
        hvd.broadcast_variables(keras.Sequential([keras.Input((2,)), adapting, finalized]))


def check_local_variables_of_a_normalization() -> None:
    """Left to each rank, with their layer's constants."""
    model = adapted_model(hvd.rank())
    model.compile(sgd(), "mse")
    norm = model.layers[1].layers[0]
    before = norm.mean.numpy().tolist()
    local = [norm.adapt_mean, norm.adapt_variance]
    fitted_loss(model, [hvd.callbacks.BroadcastVariablesCallback(local_variables=local)])
    assert norm.mean.numpy().tolist() == before
    assert not all_equal(before)


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
    with pytest.raises(ValueError, match=r"Say which to set: LearningRateWarmupCallback\(..., optimizer=optimizer\)"):
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
    with pytest.warns(UserWarning, match=r"some do not average.*\['plain'\]"):
        fit(sgd(0.1), plain())
    with pytest.warns(UserWarning, match="optimizer that does not average"):
        fit(plain(), plain())
    with pytest.raises(RuntimeError, match="inside a LossScaleOptimizer"):
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
