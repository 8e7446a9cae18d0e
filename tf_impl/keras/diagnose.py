"""`diagnose`: why evaluation is poor where training accuracy is high."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import keras

from hvd_syncbn import diagnosis, native, population
from hvd_syncbn.diagnosis import Diagnosis
from hvd_syncbn.population import Vector
from hvd_syncbn.tf_impl.keras.convert import batch_norms, checked
from hvd_syncbn.tf_impl.keras.layer import SyncBatchNormalization
from hvd_syncbn.tf_impl.keras.recalibrate import _batches, _call, _Network, _Ranks, _to_core, _undone

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet

_ADVICE = diagnosis.Advice(
    broadcast="Pass BroadcastVariablesCallback() to fit().",
    convert="Call hvd_syncbn.keras.convert_sync_batchnorm(model).",
    recalibrate="Call hvd_syncbn.keras.recalibrate(model, batches).",
    rename="Give the models or layers names of their own.",
    momentum=lambda weight: f"momentum={1 - weight:.2g}",
)


def diagnose(
    model: keras.layers.Layer,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    process_set: ProcessSet | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Compare a model's moving statistics with those of data, and say what to do about poor evaluation.

    The statistics of the data are those that `recalibrate(model, batches)` would store: the means over the batches (of all
    ranks together), every layer normalizing each batch by its own statistics. Nothing of the model changes. Every rank must
    call it.

    Args:
        model: Model or layer, built. Layers are observed that `forward` calls.
        batches: This rank's batches, as in `recalibrate`. Batches of the training data tell whether the statistics are right.
            `None` only reports what shows without data: which layers are local, frozen or named alike, the numbers of
            updates (of a compiled model: its optimizer's steps), NaN, ranks that differ.
        forward: Called as `forward(model, batch)` instead of the model.
        process_set: Horovod process set whose ranks share the data; `None` for all ranks.
        progress: Whether the first rank shows a progress bar if the pass takes more than a second.

    Returns:
        A `Diagnosis`, the same on every rank: `print` it, or use its `layers`, `advice` and `plot()`.

    Raises:
        TypeError: `model` is not a Keras 3 model or layer, or `batches` is not an iterable of batches.
        ValueError: The model is not built; no rank has a batch; there is one value per channel; ranks have different models.
            These errors are raised on every rank.
        RuntimeError: Horovod is missing or not initialized; Keras's backend is not TensorFlow; another rank failed.

    Example:

    >>> import horovod.tensorflow as hvd, keras, numpy as np
    >>> from hvd_syncbn.keras import SyncBatchNormalization, diagnose
    >>> hvd.init()
    >>> model = keras.Sequential([keras.Input((2,)), SyncBatchNormalization(name="norm")])
    >>> found = diagnose(model, [np.random.default_rng(0).standard_normal((8, 2)) + 5])
    >>> found.layers[0].is_off, found.layers[0].kind
    (True, 'synchronized')
    """

    def facts() -> list[diagnosis.Facts]:
        return [_facts(path, norm, updates) for path, norm in norms]

    def statistics() -> list[list[Vector]]:
        return [[_to_core(variable) for variable in (norm.moving_mean, norm.moving_variance)] for _, norm in norms]

    def prepare() -> population.Network:
        arrays = (keras.KerasTensor, tf.Tensor, tf.Variable)
        population.check_arguments(batches, None, forward, False, False, arrays)
        network = _Network(model, forward or _call, False)
        undo.enter_context(_undone(model, network.norms))
        return network

    norms = list(batch_norms(checked(model)))
    for path, norm in norms:
        if not norm.built:
            raise ValueError(f"the model is not built: call it on a batch first. Received: layer {path!r} without weights")
    optimizer = getattr(model, "optimizer", None)
    updates = None if optimizer is None else int(optimizer.iterations)
    with contextlib.ExitStack() as undo:
        data = None if batches is None else _batches(batches)
        return diagnosis.diagnose(_Ranks(process_set), facts, prepare, statistics, data, progress, _ADVICE)


def _facts(path: str, norm: Any, updates: int | None) -> diagnosis.Facts:
    synchronized = isinstance(norm, SyncBatchNormalization)
    is_frozen = not norm.trainable or getattr(norm, "frozen", None)
    averages = synchronized and norm.averages
    return diagnosis.Facts(
        path,
        diagnosis.FROZEN if is_frozen else diagnosis.SYNCHRONIZED if synchronized else diagnosis.LOCAL,
        norm.collective_name if synchronized else None,
        int(norm.batches) if averages else updates,
        None if averages else 1 - norm.momentum,
        native.nonfinite_batches(norm.collective_name) if synchronized else 0,
    )
