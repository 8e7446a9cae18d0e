"""`recalibrate`: the moving statistics of a model's batch norms, from a pass over data."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from hvd_syncbn import population, protocol
from hvd_syncbn.population import Take, Vector, Words
from hvd_syncbn.tf_impl.keras import ranks
from hvd_syncbn.tf_impl.keras.convert import batch_norms
from hvd_syncbn.tf_impl.keras.layer import SyncBatchNormalization

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from hvd_syncbn.tf_impl import functional

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet

Forward = Callable[[Any, Any], Any]


def recalibrate(
    model: keras.layers.Layer,
    batches: Iterable[Any],
    *,
    estimator: str | None = None,
    forward: Forward | None = None,
    process_set: ProcessSet | None = None,
    init_affine: bool = False,
    progress: bool = True,
    layer_by_layer: bool = False,
) -> keras.layers.Layer:
    """Replace the moving statistics of a model's batch norms by those of data, each rank giving its shard.

    Every `SyncBatchNormalization` and `keras.layers.BatchNormalization` takes part, wherever it is; one that is frozen (by
    `freeze_batchnorm` or `trainable = False`) does not, nor does a class derived from Keras's, with a warning. Ranks may have
    any number of batches of any size, also none. Nothing else of the model changes, neither other variables nor the state of
    its random numbers. The pass is in inference mode (no dropout). It needs Keras's TensorFlow backend and runs eagerly. See
    `docs/recalibration.md`.

    Args:
        model: Model or layer, built; changed in place. Those of its layers take part that `forward` reaches.
        batches: This rank's: what `fit` takes as batches. Of a tuple the first element is the input. A `tf.data.Dataset`,
            `keras.utils.PyDataset`, `torch.utils.data.DataLoader`, or any iterable.
        estimator: `"batches"` for the means of the global batches' means and unbiased variances, as in Ioffe and Szegedy, 2015,
            every layer normalizing each batch (of all ranks together) by its own: right in one pass over shuffled batches,
            whatever the moving statistics are. `"pooled"` for mean and variance of all values (times `n / (n - 1)` where the
            layer has `unbiased_variance`), the layers normalizing by their moving statistics meanwhile: right behind layers
            whose moving statistics are right. `None` is `"batches"`, with `layer_by_layer` and `init_affine` `"pooled"`.
        forward: Called as `forward(model, batch)` in place of all that, with the batch as it comes.
        process_set: Horovod process set whose ranks share the data; `None` for all.
        init_affine: Whether to set gamma and beta to standard deviation and mean, too, so that every layer becomes the
            identity: for norms that were inserted into a trained network. They are the identity during the pass.
        progress: Whether the first rank shows a bar where it takes more than a second.
        layer_by_layer: Whether to repeat the pass, at most once for every layer, until the statistics are those of the inputs
            that the layers have in the recalibrated model: exact. Only with `"pooled"`, and batches that can be read again.

    Returns:
        `model`.

    Raises:
        TypeError: No model, or no iterable of batches.
        ValueError: No layer has moving statistics to replace, the model is not built, no rank has a batch, one value per
            channel, an unknown estimator, ranks with different models. All of these, and what `forward` raises, on every rank,
            and the model is as it was.
        RuntimeError: Horovod is missing or not initialized; another backend than TensorFlow; another rank failed.

    Example:

    >>> import horovod.tensorflow as hvd, keras, numpy as np
    >>> from hvd_syncbn.keras import recalibrate
    >>> hvd.init()
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization()])
    >>> batches = [np.array([[1.0, 10.0], [2.0, 10.0]]), np.array([[2.0, 10.0], [4.0, 10.0]])]
    >>> model = recalibrate(model, batches)
    >>> model.layers[0].moving_mean.numpy(), model.layers[0].moving_variance.numpy().round(3)
    (array([ 2.25, 10.  ], dtype=float32), array([1.25, 0.  ], dtype=float32))
    """

    def prepare() -> _Network:
        if not isinstance(model, keras.layers.Layer):
            raise TypeError(f"expected a model or layer of Keras 3. Received: {type(model).__module__}.{type(model).__name__}")
        population.check_arguments(
            batches, estimator, forward, init_affine, layer_by_layer, (keras.KerasTensor, tf.Tensor, tf.Variable)
        )
        if isinstance(batches, tf.data.Dataset) and batches.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError("expected batches that end: use `dataset.take(n)`. Received: a tf.data.Dataset without an end")
        network = _Network(model, forward or _call, init_affine)
        undo.enter_context(_undone(model, network.norms))
        return network

    with contextlib.ExitStack() as undo:
        data = _batches(batches)
        population.recalibrate(_Ranks(process_set), prepare, data, estimator, init_affine, layer_by_layer, progress)
    return model


class _Ranks:
    def __init__(self, process_set: ProcessSet | None) -> None:
        self.group = ranks.find(process_set)
        self.size = self.group.size
        self.rank = self.group.ranks.index(self.group.rank)

    def gather(self, value: Any) -> list[Any]:
        return self.group.gather(value, "recalibrate")

    def sum(self, words: Words, name: str) -> Words:
        if self.size == 1:
            return words
        return np.array(self.group.sum(tf.constant(words), name).numpy())


class _Network:
    def __init__(self, model: keras.layers.Layer, forward: Forward, init_affine: bool) -> None:
        self.model = model
        self.forward = forward
        self.init_affine = init_affine
        self.norms: list[Any] = []
        self.layers: list[population.Layer] = []
        frozen = []
        for path, norm in batch_norms(model):
            if not norm.trainable or getattr(norm, "frozen", False):
                frozen.append(path)
                continue
            if type(norm) is not keras.layers.BatchNormalization and not isinstance(norm, SyncBatchNormalization):
                warnings.warn(
                    f"layer {path!r} keeps its statistics, because its class may do anything to its inputs. "
                    f"Received: an instance of {type(norm).__name__}",
                    stacklevel=7,
                )
                continue
            if not norm.built:
                raise ValueError(f"the model is not built: call it on a batch first. Received: layer {path!r} without weights")
            if init_affine and (norm.gamma is None or norm.beta is None):
                raise ValueError(f"init_affine needs layers with scale and center. Received: layer {path!r} without")
            self.norms.append(norm)
            unbiased = bool(getattr(norm, "unbiased_variance", False) or getattr(norm, "zero_debias", False))
            self.layers.append(population.Layer(path, norm.moving_mean.shape[0], norm.epsilon, unbiased))
        if not self.norms:
            raise ValueError(
                "the model has no batch normalization layer whose moving statistics could be replaced. "
                + (f"Received: frozen layers {frozen}" if frozen else f"Received: {type(model).__name__}")
            )
        self.stored: dict[int, Any] = {}

    def run(self, batch: Any, take: Take) -> None:
        with contextlib.ExitStack() as watching:
            for i in range(len(self.norms)):
                watching.enter_context(self._watched(i, take))
            watching.enter_context(_functions_run_eagerly(True))
            self.forward(self.model, batch)

    @contextlib.contextmanager
    def _watched(self, index: int, take: Take) -> Iterator[None]:
        norm = self.norms[index]

        def call(inputs: Any, training: bool | None = None, mask: Any = None, residual: Any = None) -> Any:
            outputs = self._normalize(index, take, inputs, mask, residual)
            return keras.ops.relu(outputs) if getattr(norm, "activation", None) == "relu" else outputs

        # The instance's own, past Keras's __setattr__, which would take it for a state to track.
        object.__setattr__(norm, "call", call)
        try:
            yield
        finally:
            object.__delattr__(norm, "call")

    def _normalize(self, index: int, take: Take, x: Any, mask: Any, residual: Any) -> Any:
        """What a watched layer makes of its input, by the kernels of training, whose bits do not depend on the layout.

        With the residual, as there: a step of its own would round once more.
        """
        norm, layer = self.norms[index], self.layers[index]
        if not tf.executing_eagerly():
            raise RuntimeError(
                "recalibrate needs to see values: the layer runs in a graph (a `tf.data` function, a vectorized map). "
                f"Received: layer {layer.name!r}, inputs {x}"
            )
        packet = functional.forward_packet(x, layer.eps, norm.axis, mask)
        reduced = take(index, packet.numpy())
        if self.init_affine:
            return x if residual is None else x + residual
        by = self._stored(index) if reduced is None else tf.constant(reduced)
        return functional.normalize_by(by, x, norm.gamma, norm.beta, residual, layer.eps, norm.axis, layer.name)

    def _stored(self, index: int) -> Any:
        if index not in self.stored:
            norm = self.norms[index]
            mean, variance = (v.value.numpy().astype(np.float64).tolist() for v in (norm.moving_mean, norm.moving_variance))
            words = protocol.stored_packet(mean, variance).words()
            self.stored[index] = tf.constant(words, tf.int64)
        return self.stored[index]

    def read(self, index: int) -> list[Vector]:
        return [_to_core(variable) for variable in self._variables(index)]

    def write(self, index: int, vectors: Sequence[Vector]) -> None:
        self.stored.clear()
        for variable, (array, _) in zip(self._variables(index), vectors, strict=True):
            variable.assign(array.view(variable.value.dtype.as_numpy_dtype))

    def _variables(self, index: int) -> list[Any]:
        norm = self.norms[index]
        return [norm.moving_mean, norm.moving_variance, *([norm.gamma, norm.beta] if self.init_affine else [])]


def _to_core(variable: Any) -> Vector:
    array = variable.value.numpy().copy()
    return (array.view(np.uint16) if array.itemsize == 2 else array), array.dtype.name


@contextlib.contextmanager
def _undone(model: keras.layers.Layer, watched: Sequence[Any]) -> Iterator[None]:
    """Afterwards all variables that no optimizer trains are as before, but those of the watched layers."""
    own = {id(variable) for norm in watched for variable in norm.variables}
    variables = [(v, tf.identity(v.value)) for v in model.variables if id(v) not in own and not v.trainable]
    try:
        yield
    finally:
        for variable, value in variables:
            variable.assign(value)


@contextlib.contextmanager
def _functions_run_eagerly(eagerly: bool) -> Iterator[None]:
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(eagerly)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


class _Pairs:
    """A PyDataset or a DataLoader as `fit` reads it."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        length = self.data.num_batches if isinstance(self.data, keras.utils.PyDataset) else len(self.data)
        if length is None:
            raise TypeError("a PyDataset without an end")
        return int(length)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.data, keras.utils.PyDataset):
            yield from (self.data[i] for i in range(len(self)))
        else:  # a DataLoader's lists are tuples to Keras
            yield from (tuple(batch) if isinstance(batch, list) else batch for batch in self.data)


def _batches(batches: Any) -> Any:
    of_torch = type(batches).__module__.startswith("torch.utils.data")
    return _Pairs(batches) if of_torch or isinstance(batches, keras.utils.PyDataset) else batches


def _call(model: keras.layers.Layer, batch: Any) -> Any:
    found = batch[0] if isinstance(batch, tuple) and batch else batch
    inputs = getattr(model, "inputs", None)
    if isinstance(found, list) and len(found) > 1 and inputs is not None and len(inputs) == 1:
        found = found[0]  # [x, y] for a model of one input
    if isinstance(found, str | bytes | None):
        raise TypeError(
            "expected batches of tensors, of tuples that begin with one, or of a model's inputs as lists and dictionaries; for "
            f"others pass `forward`. Received: {type(batch).__name__}"
        )
    found = keras.tree.map_structure(lambda x: x.numpy() if type(x).__module__ == "torch" else x, found)
    return model(found, training=False)
