"""Horovod's functions for values and variables of Keras 3, and its gradient tape.

Horovod's own ask variables for `.ref()` and `.op`, which only `tf.Variable` has, and know neither bfloat16 nor uint32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from hvd_syncbn.tf_impl.keras import ranks
from hvd_syncbn.tf_impl.keras.optimizer import _Averager, backing, local_variables

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet


def broadcast_variables(
    variables: Iterable[Any], root_rank: int = 0, process_set: ProcessSet | None = None, inplace: bool = False
) -> None:
    """Give all ranks the values that one rank's variables have.

    Args:
        variables: Variables of Keras or TensorFlow, as `model.variables` or `optimizer.variables` (in Keras 3 no method), the
            same on all ranks.
        root_rank: The rank whose values are taken.
        process_set: The `hvd.ProcessSet` to broadcast in. Defaults to all ranks.
        inplace: What Horovod takes to save memory; this goes through the host's memory, one variable after the other.

    Raises:
        ValueError: On every rank, if the ranks' variables differ in number, shape or dtype.
        RuntimeError: In a `tf.function`, or if Horovod is missing or not initialized.

    Example:

    ```python
    if first_batch:  # the model and the optimizer are built
        broadcast_variables(model.variables, root_rank=0)
        broadcast_variables(optimizer.variables, root_rank=0)
    ```
    """
    if not tf.executing_eagerly():
        raise RuntimeError("broadcast_variables() has to be called outside of a tf.function. Received: a call in a graph")
    variables = list(variables)
    layout = [(tuple(v.shape), keras.backend.standardize_dtype(v.dtype)) for v in variables]
    layouts, hvd, process_set = ranks.gather(layout, "layout", process_set)
    for by_rank in itertools.zip_longest(*layouts):
        if any(layout != by_rank[0] for layout in by_rank):
            raise ValueError(
                "The model and its optimizer must have the same variables on all ranks. "
                f"Received: {[len(layout) for layout in layouts]} variables by rank, the first that differs has "
                f"(shape, dtype) {list(by_rank)}"
            )
    if len(layouts) == 1:
        return
    with tf.device("CPU:0"):
        for variable in variables:
            # As signed integers, since Horovod's TensorFlow part knows neither bfloat16 nor uint32.
            value = np.asarray(tf.convert_to_tensor(variable).numpy())
            bits = hvd.broadcast(value.view(f"i{value.itemsize}"), root_rank, process_set=process_set)
            variable.assign(np.asarray(bits.numpy()).view(value.dtype))


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: Any = None,
    compression: Any = None,
    **options: Any,
) -> tf.Tensor:
    """Return the average over all ranks (or what `op` says) of a value: a number, a list, an array, a tensor or a variable.

    Arguments are those of `horovod.tensorflow.keras.allreduce`; `options` are the others of `horovod.tensorflow.allreduce`,
    such as `process_set`.
    """
    hvd = ranks.require()
    return hvd.allreduce(
        tf.convert_to_tensor(value),
        average=average,
        op=op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        compression=compression or hvd.Compression.none,
        name=name,
        **options,
    )


def allgather(value: Any, name: str | None = None, **options: Any) -> tf.Tensor:
    """Return the values of all ranks, joined along the first axis. `options` are those of `horovod.tensorflow.allgather`."""
    return ranks.require().allgather(tf.convert_to_tensor(value), name=name, **options)


def broadcast(value: Any, root_rank: int, name: str | None = None, **options: Any) -> tf.Tensor:
    """Return the value of one rank. `options` are those of `horovod.tensorflow.broadcast`."""
    return ranks.require().broadcast(tf.convert_to_tensor(value), root_rank, name=name, **options)


def reducescatter(value: Any, name: str | None = None, op: Any = None, **options: Any) -> tf.Tensor:
    """Return this rank's part of the average over all ranks. `options` are those of `horovod.tensorflow.reducescatter`."""
    hvd = ranks.require()
    return hvd.reducescatter(tf.convert_to_tensor(value), name=name, op=hvd.Average if op is None else op, **options)


class _DistributedGradientTape:
    """A `tf.GradientTape` whose `gradient()` is that of all ranks; the rest is the tape's own."""

    def __init__(self, tape: tf.GradientTape, op: Any, **options: Any) -> None:
        self._tape = tape
        self._averager = _Averager(**options)
        self._averager.op = op

    def __enter__(self) -> _DistributedGradientTape:
        self._tape.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._tape.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tape, name)

    def watch(self, tensor: Any) -> None:
        """Watch a tensor or a variable, of Keras, too."""
        self._tape.watch(keras.tree.map_structure(backing, tensor))

    def register_local_source(self, source: Any) -> None:
        """Leave the gradient of a variable to each rank."""
        self._averager.register_local([source])

    def gradient(self, target: Any, sources: Any, output_gradients: Any = None, **options: Any) -> Any:
        """Return the gradients as `tf.GradientTape.gradient` does, averaged over the ranks.

        Args:
            target: Tensor, or a structure of them, to be differentiated.
            sources: Variable of Keras or TensorFlow, tensor, or a structure of them.
            output_gradients: Gradients of the elements of `target`.
            options: The other arguments of `tf.GradientTape.gradient`. Horovod's `use_generic_names` is taken and of no use:
                names never depend on what else a rank has made.
        """
        options.pop("use_generic_names", None)
        variables = keras.tree.flatten(sources)
        sources = keras.tree.map_structure(backing, sources)
        gradients = self._tape.gradient(target, sources, output_gradients, **options)
        averager = self._averager
        averager.prefix = _unused_name()
        result = averager.average(_flatten_gradients(gradients), variables)
        return keras.tree.pack_sequence_as(sources, result) if keras.tree.is_nested(sources) else result[0]

    def get_local_and_global_gradients(
        self, target: Any, sources: Sequence[Any], output_gradients: Any = None, **options: Any
    ) -> tuple[list[Any], list[Any]]:
        """Return pairs of source and gradient: those left to each rank, and those of all ranks."""
        pairs = list(zip(sources, self.gradient(target, list(sources), output_gradients, **options), strict=True))
        local = self._averager.places(sources)
        chosen = [[pair for i, pair in enumerate(pairs) if (i in local) == which] for which in (True, False)]
        return chosen[0], chosen[1]


def _flatten_gradients(gradients: Any) -> list[Any]:
    return list(tf.nest.flatten(gradients, expand_composites=False))


def _unused_name() -> str:
    """The same on every rank, and used once in a graph: TensorFlow may run two exchanges of one graph at a time."""
    name = "hvd_syncbn.DistributedGradientTape"
    if tf.executing_eagerly():
        return name
    graph = tf.compat.v1.get_default_graph()
    while getattr(graph, "outer_graph", None) is not None and graph.outer_graph.building_function:
        graph = graph.outer_graph
    return str(graph.unique_name(name.replace(".", "_")))


def DistributedGradientTape(
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = None,
    sparse_as_dense: bool = False,
    op: Any = None,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: ProcessSet | None = None,
    scale_local_gradients: bool = True,
) -> Any:
    """Make a `tf.GradientTape` return gradients that are averaged over all ranks, for variables of Keras 3, too.

    Args:
        gradtape: The tape, before or after it has recorded.
        device_dense: What Horovod takes and this has no use for: gradients are exchanged where they are.
        device_sparse: Likewise.
        compression: One of `hvd.Compression`, for dense gradients. Defaults to none.
        sparse_as_dense: Whether to add up `tf.IndexedSlices` into dense gradients.
        op: `hvd.Average`, the default, or `hvd.Sum`.
        gradient_predivide_factor: Dense gradients are divided by it before they are added up, and multiplied with it after.
        num_groups: What Horovod takes and this has no use for: all gradients of a dtype are one group.
        groups: Likewise.
        process_set: The `hvd.ProcessSet` to average over. Defaults to all ranks.
        scale_local_gradients: Whether gradients of `register_local_source()` are divided by the number of ranks.

    Raises:
        TypeError: If `gradtape` is not a `tf.GradientTape`.
        ValueError: If `op` is another one, or `gradient_predivide_factor` is given with `hvd.Sum`.
        RuntimeError: If Horovod is missing or not initialized, or XLA is to compile the step.

    Example:

    ```python
    with tf.GradientTape() as tape:
        loss = loss_fn(y, model(x, training=True))
    tape = DistributedGradientTape(tape)
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    ```
    """
    hvd = ranks.require()
    if not isinstance(gradtape, tf.GradientTape):
        raise TypeError(f"`gradtape` has to be a `tf.GradientTape`. Received: {gradtape!r}")
    op = hvd.Average if op is None else op
    if op not in (hvd.Average, hvd.Sum):
        raise ValueError(f"`op` has to be `hvd.Average` or `hvd.Sum`. Received: op={op}")
    if op == hvd.Sum and gradient_predivide_factor != 1.0:
        raise ValueError(
            "`gradient_predivide_factor` splits an average, not a sum. "
            f"Received: gradient_predivide_factor={gradient_predivide_factor}, op=hvd.Sum"
        )
    return _DistributedGradientTape(
        gradtape,
        op,
        process_set=process_set,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        scale_local_gradients=scale_local_gradients,
    )


def PartialDistributedGradientTape(gradtape: tf.GradientTape, *args: Any, local_layers: Any = None, **kwargs: Any) -> Any:
    """Make a tape distributed but for the gradients of some layers, which each rank keeps.

    Args:
        gradtape: The tape.
        args: As of `DistributedGradientTape`.
        local_layers: A layer, or several, built, whose variables are each rank's own.
        kwargs: As of `DistributedGradientTape`.

    Raises:
        ValueError: If `local_layers` holds anything but layers, or one that is not built.
    """
    variables = local_variables(local_layers)
    tape = DistributedGradientTape(gradtape, *args, **kwargs)
    for variable in variables:
        tape.register_local_source(variable)
    return tape
