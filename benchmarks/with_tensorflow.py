"""The contestants in TensorFlow and Keras.

One process uses Keras 3 for its own layer and ours, legacy Keras for Horovod's layer (tf_keras, selected as `tf.keras` before
TensorFlow is imported), and Keras 3 under TensorFlow's own strategy for `synchronized=True`.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from benchmarks.measure import EPS, SETS, Step, timed
from hvd_syncbn.cli.networks import EXPANSION, STEM, resnet
from hvd_syncbn.keras import SyncBatchNormalization


class OneRound(keras.layers.BatchNormalization):
    """Sum, sum of squares and count in one allreduce: framework ops, autograd through both."""

    def _moments(self, x: Any, mask: Any) -> tuple[Any, Any]:
        axes = [i for i in range(x.ndim) if i != self.axis % x.ndim]
        total, squares, count = _all_sums(tf.reduce_sum(x, axes), tf.reduce_sum(x * x, axes), [_values(x, axes)])
        mean = total / count
        return mean, squares / count - mean * mean


class TwoRounds(keras.layers.BatchNormalization):
    """Sum and count in one allreduce, the squares around the mean in a second."""

    def _moments(self, x: Any, mask: Any) -> tuple[Any, Any]:
        axes = [i for i in range(x.ndim) if i != self.axis % x.ndim]
        total, count = _all_sums(tf.reduce_sum(x, axes), [_values(x, axes)])
        mean = total / count
        centered = x - tf.reshape(mean, [1 if i in axes else -1 for i in range(x.ndim)])
        (squares,) = _all_sums(tf.reduce_sum(centered * centered, axes))
        return mean, squares / count


def _values(x: Any, axes: list[int]) -> Any:
    return tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), axes)), x.dtype)


def _all_sums(*parts: Any) -> list[Any]:
    sizes = [len(part) if isinstance(part, list) else part.shape[0] for part in parts]
    return tf.split(hvd.allreduce(tf.concat(parts, 0), op=hvd.Sum), sizes)


class _Chain:
    """Layers, one after the other."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def __call__(self, x: Any, training: bool) -> Any:
        for layer in self.layers:
            x = layer(x, training=training)
        return x

    @property
    def trainable_variables(self) -> list[Any]:
        return [variable for layer in self.layers for variable in layer.trainable_variables]


class TensorFlow:
    """See `measure.Framework`."""

    local: tuple[str, ...] = ("local", "ours")
    engines: tuple[str, ...] = ("horovod",)
    layout = "channels last"
    depth = 20

    def __init__(self, ranks: int, threads: int, ports: list[int], sets: bool) -> None:
        """Initialize Horovod, with `sets` also the process sets SETS.

        With `ports` (one for each rank), create a `MultiWorkerMirroredStrategy`.
        """
        self.threads = threads
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(2 if ranks > 1 else 1)
        alone = [hvd.ProcessSet([rank]) for rank in range(ranks)] if ranks > 1 else []  # every rank must register every set
        pairs = [hvd.ProcessSet(pair) for pair in SETS] if sets else []
        hvd.init(process_sets=[*alone, *pairs])
        self.rank = hvd.rank()
        self._alone = alone[self.rank] if alone else None
        self._pair = next((pair for pair in pairs if pair.included()), None)
        self._strategy = None
        self.synchronized: tuple[str, ...] = ("ours alone", "ours", "local", "one round", "two rounds", "horovod")
        if ports:
            workers = [f"127.0.0.1:{port}" for port in ports]
            task = {"type": "worker", "index": hvd.rank()}
            os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
            self._strategy = tf.distribute.MultiWorkerMirroredStrategy()
            self.synchronized = ("ours", "synchronized")
        self._layers = 0

    def barrier(self) -> None:
        if hvd.size() > 1:
            _barrier()

    def shutdown(self) -> None:
        hvd.shutdown()

    def layer(self, name: str, layout: str = "channels last", dtype: str = "float32") -> Any:
        """A contestant's layer."""
        options: dict[str, Any] = {
            "axis": -1 if layout == "channels last" else 1,
            "epsilon": EPS,
            "dtype": dtype if dtype == "float32" else f"mixed_{dtype}",
        }
        if name in ("ours", "ours alone"):
            self._layers += 1
            alone = self._alone if name == "ours alone" else None
            return SyncBatchNormalization(**options, process_set=alone, name=f"{name.replace(' ', '_')}_{self._layers}")
        if name == "synchronized":
            assert self._strategy is not None
            with self._strategy.scope():
                return keras.layers.BatchNormalization(**options, synchronized=True)
        if name == "horovod":
            self._layers += 1
            return hvd.SyncBatchNormalization(**options, name=f"horovod_{self._layers}")
        kinds = {"local": keras.layers.BatchNormalization, "one round": OneRound, "two rounds": TwoRounds}
        return kinds[name](**options)

    def step(self, name: str, shape: tuple[int, ...], layout: str, dtype: str) -> Step:
        x, dy = (tf.cast(tf.constant(_random(seed, shape, layout)), dtype) for seed in range(2))
        return self._step(name, self.layer(name, layout, dtype), x, dy)

    def chain(self, name: str, shape: tuple[int, ...]) -> Step:
        x, dy = (tf.constant(_random(seed, shape, "channels last")) for seed in range(2))
        return self._step(name, _Chain([self.layer(name) for _ in range(self.depth)]), x, dy)

    def allreduce(self, words: int, engine: str = "horovod") -> Step:
        return _allreduce(words, "bare", hvd.global_process_set)

    def set_allreduce(self, words: int) -> Step:
        return _allreduce(words, "set", self._pair)

    def network(self, name: str, images: int, size: int) -> Step:
        x = tf.constant(_random(0, (images, 3, size, size), "channels last"))
        if name == "synchronized":
            assert self._strategy is not None
            with self._strategy.scope():
                model = self._resnet50(name, size)
        else:
            model = self._resnet50(name, size)
        return self._whole(name, model, x, tf.random.stateless_normal(model(x).shape, (0, 0)))

    def normalize(
        self, name: str, x: NDArray[np.float32], gamma: NDArray[np.float32], beta: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        layer = self.layer(name)
        inputs = tf.constant(np.moveaxis(x, 1, -1))
        layer.build(inputs.shape)
        layer.gamma.assign(gamma)
        layer.beta.assign(beta)
        if name == "synchronized":
            assert self._strategy is not None
            strategy = self._strategy
            y = strategy.run(tf.function(lambda: layer(inputs, training=True), autograph=False))
        else:
            y = tf.function(lambda: layer(inputs, training=True), autograph=False)()
        return np.moveaxis(y.numpy(), -1, 1)

    def _step(self, name: str, model: Any, x: Any, dy: Any) -> Step:
        if name == "synchronized":
            return self._whole(name, model, x, dy)
        variables = _variables(model, x)
        forward = tf.function(lambda x: model(x, training=True), autograph=False)

        def step() -> tuple[float, float]:
            start = time.perf_counter()
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = forward(x)
            middle = time.perf_counter()
            tape.gradient(y, [x, *variables], dy)
            return middle - start, time.perf_counter() - middle

        return step

    def _whole(self, name: str, model: Any, x: Any, dy: Any) -> Step:
        """Return forward and backward as one program, which a strategy requires and which takes half the time to trace."""
        variables = _variables(model, x)

        def both() -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = model(x, training=True)
            return y, tape.gradient(y, [x, *variables], dy)

        strategy = self._strategy
        if name == "synchronized" and strategy is not None:
            return timed(tf.function(lambda: strategy.run(both), autograph=False))
        return timed(tf.function(both, autograph=False))

    def _resnet50(self, name: str, size: int) -> Any:
        kind = tf.keras if name == "horovod" else keras  # a model and its layers must come from the same Keras
        layers = kind.layers
        inputs = y = kind.Input((size, size, 3))

        def unit(x: Any, channels: int, kernel: int, stride: int = 1) -> Any:
            return self.layer(name)(layers.Conv2D(channels, kernel, stride, "same", use_bias=False)(x))

        y = layers.MaxPooling2D(3, 2, "same")(layers.ReLU()(unit(y, STEM, 7, 2)))
        for block in resnet():
            wide = EXPANSION * block.channels
            shortcut = unit(y, wide, 1, block.stride) if block.project else y
            y = layers.ReLU()(unit(y, block.channels, 1))
            y = layers.ReLU()(unit(y, block.channels, 3, block.stride))
            y = layers.ReLU()(layers.Add()([unit(y, wide, 1), shortcut]))
        return kind.Model(inputs, y)


def _allreduce(words: int, name: str, process_set: Any) -> Step:
    packet = tf.zeros(words, tf.int64)

    @tf.function(autograph=False)
    def reduce() -> Any:
        return hvd.allreduce(packet, name=f"hvd_syncbn.{name}.{words}", op=hvd.Sum, process_set=process_set)

    once = timed(reduce)
    return lambda: once() + once()


def _variables(model: Any, x: Any) -> list[Any]:
    model(x, training=False)  # builds it, outside of any function
    return [v.value if isinstance(v, keras.Variable) else v for v in model.trainable_variables]


def _random(seed: int, shape: tuple[int, ...], layout: str) -> NDArray[np.float32]:
    if layout == "channels last":
        shape = (shape[0], *shape[2:], shape[1])
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@tf.function(autograph=False)
def _barrier() -> Any:
    return hvd.allreduce(tf.zeros(1), name="barrier", op=hvd.Sum)
