"""State that layers keep outside of their variables: constants, vocabularies, bins, assets.

All ranks of one job run the checks together; any number of ranks from 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_syncbn.keras as hvd
from tests.parallel.checks.keras_horovod import all_equal, shared_folder

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
