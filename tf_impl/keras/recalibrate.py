"""`recalibrate`: compute the moving statistics of a model's batch norms in a pass over data."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from hvd_syncbn import population
from hvd_syncbn.population import Take, Vector, Words
from hvd_syncbn.renorm import stddev_of
from hvd_syncbn.tf_impl.keras import ranks
from hvd_syncbn.tf_impl.keras.convert import batch_norms
from hvd_syncbn.tf_impl.keras.layer import SyncBatchNormalization, check_mask, renormalizes

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
    """Replace the moving statistics of a model's batch norms by the statistics of data that is split over the ranks.

    Every `SyncBatchNormalization` and `keras.layers.BatchNormalization` in the model takes part, except frozen ones (by
    `freeze_batchnorm` or `trainable = False`). Other subclasses do not take part, with a warning. Ranks may have any number of
    batches of any size, including none. Nothing else in the model changes: other variables and the state of random number
    generators are kept. The pass is in inference mode (no dropout). It needs Keras's TensorFlow backend and runs eagerly. See
    `docs/recalibration.md`.

    Args:
        model: Model or layer, built; changed in place. Layers take part if `forward` calls them.
        batches: This rank's batches, as for `fit`. If a batch is a tuple, its first element is the input. A `tf.data.Dataset`,
            `keras.utils.PyDataset`, `torch.utils.data.DataLoader`, or any iterable.
        estimator: `"batches"`: the means of the global batches' means and unbiased variances, as in Ioffe and Szegedy, 2015.
            Every layer normalizes each batch (of all ranks together) by the batch's own statistics. The result is correct after
            one pass over shuffled batches and does not depend on the present moving statistics. `"pooled"`: the mean and
            variance of all values (times `n / (n - 1)` if the layer has `unbiased_variance`). The layers normalize by their
            moving statistics during the pass, so a layer's result is correct if the moving statistics of the layers before it
            are. `None` means `"pooled"` with `layer_by_layer` or `init_affine`, else `"batches"`.
        forward: Called as `forward(model, batch)` instead of the model, with the unchanged batch.
        process_set: Horovod process set whose ranks share the data; `None` for all ranks.
        init_affine: Whether to also set gamma and beta to the standard deviation and mean, so that every layer becomes the
            identity: for norms that were inserted into a trained network. The layers are the identity during the pass.
        progress: Whether the first rank shows a progress bar if the pass takes more than a second.
        layer_by_layer: Whether to repeat the pass, at most once per layer, until the statistics are exactly those of the
            layers' inputs in the recalibrated model. Needs `"pooled"` and batches that can be iterated repeatedly.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a Keras 3 model or layer, or `batches` is not an iterable of batches.
        ValueError: No layer has moving statistics to replace; the model is not built; no rank has a batch; there is one value
            per channel; the estimator is unknown; ranks have different models. These errors, and errors in `forward`, are
            raised on every rank and leave the model unchanged.
        RuntimeError: Horovod is missing or not initialized; Keras's backend is not TensorFlow; another rank failed.

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

    norms: list[Any] = []

    def prepare() -> _Network:
        if not isinstance(model, keras.layers.Layer):
            raise TypeError(f"expected a Keras 3 model or layer. Received: {type(model).__module__}.{type(model).__name__}")
        population.check_arguments(
            batches, estimator, forward, init_affine, layer_by_layer, (keras.KerasTensor, tf.Tensor, tf.Variable)
        )
        if isinstance(batches, tf.data.Dataset) and batches.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError("expected a finite dataset: use `dataset.take(n)`. Received: an infinite tf.data.Dataset")
        network = _Network(model, forward or _call, init_affine)
        norms.extend(network.norms)
        undo.enter_context(_undone(model, network.norms))
        return network

    with contextlib.ExitStack() as undo:
        data = _batches(batches)
        population.recalibrate(_Ranks(process_set), prepare, data, estimator, init_affine, layer_by_layer, progress)
        for norm in filter(renormalizes, norms):
            norm.moving_stddev.assign(stddev_of(keras.ops.convert_to_numpy(norm.moving_variance), norm.epsilon))
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
                    f"layer {path!r} keeps its statistics, because a subclass may do more than BatchNormalization. "
                    f"Received: an instance of {type(norm).__name__}",
                    stacklevel=7,
                )
                continue
            if not norm.built:
                raise ValueError(f"the model is not built: call it on a batch first. Received: layer {path!r} without weights")
            if init_affine and (norm.gamma is None or norm.beta is None):
                raise ValueError(
                    "init_affine needs layers with gamma and beta. "
                    f"Received: layer {path!r} with scale={norm.scale}, center={norm.center}"
                )
            self.norms.append(norm)
            unbiased = bool(getattr(norm, "unbiased_variance", False) or getattr(norm, "zero_debias", False))
            self.layers.append(population.Layer(path, norm.moving_mean.shape[0], norm.epsilon, unbiased))
        if not self.norms:
            raise ValueError(
                "the model has no batch normalization layer whose moving statistics can be replaced. "
                + (f"Received: frozen layers {frozen}" if frozen else f"Received: {type(model).__name__}")
            )

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

        # An instance attribute, set without Keras's __setattr__, which would track it as state.
        object.__setattr__(norm, "call", call)
        try:
            yield
        finally:
            object.__delattr__(norm, "call")

    def _normalize(self, index: int, take: Take, x: Any, mask: Any, residual: Any) -> Any:
        """Return the output of a watched layer, computed by the training kernels: their results do not depend on the layout.

        The residual is added by the same kernel: adding it separately would round once more.
        """
        norm, layer = self.norms[index], self.layers[index]
        if not tf.executing_eagerly():
            raise RuntimeError(
                "recalibrate needs eager tensors, but the layer runs in a graph (a `tf.data` function, a vectorized map). "
                f"Received: layer {layer.name!r}, inputs {x}"
            )
        check_mask(norm.axis, x, mask)
        packet = functional.forward_packet(x, layer.eps, norm.axis, mask)
        reduced = take(index, packet.numpy())
        if self.init_affine:
            return x if residual is None else x + residual
        by = None if reduced is None else tf.constant(reduced)
        vectors = (norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
        # Another name than in training, where batches that are not finite are counted.
        return functional.normalize_by(by, x, *vectors, residual, layer.eps, norm.axis, f"recalibrate.{layer.name}")

    def read(self, index: int) -> list[Vector]:
        return [_to_core(variable) for variable in self._variables(index)]

    def write(self, index: int, vectors: Sequence[Vector]) -> None:
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
    """Restore all non-trainable variables on exit, except those of the watched layers."""
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
    """A PyDataset or DataLoader, iterated as `fit` does."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        length = self.data.num_batches if isinstance(self.data, keras.utils.PyDataset) else len(self.data)
        if length is None:
            raise TypeError("an infinite PyDataset")
        return int(length)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.data, keras.utils.PyDataset):
            yield from (self.data[i] for i in range(len(self)))
        else:  # Keras converts a DataLoader's lists to tuples
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
            "expected batches that are tensors, tuples that begin with one, or lists or dictionaries of the model's inputs. "
            f"For other batches pass `forward`. Received: {type(batch).__name__}"
        )
    found = keras.tree.map_structure(lambda x: x.numpy() if type(x).__module__ == "torch" else x, found)
    return model(found, training=False)
