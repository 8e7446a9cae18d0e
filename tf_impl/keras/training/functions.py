"""Horovod's functions for Keras 3 values and variables, and its gradient tape.

Horovod's own functions use `.ref()` and `.op` of variables, which only `tf.Variable` has, and support neither bfloat16 nor
uint32.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from hvd_syncbn.tf_impl.keras import layer_state, ranks
from hvd_syncbn.tf_impl.keras.convert import forget_traces
from hvd_syncbn.tf_impl.keras.training.optimizer import _Averager, backing, local_variables

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet

    from hvd_syncbn.tf_impl.horovod import Group


def broadcast_variables(
    variables: Any, root_rank: int = 0, process_set: ProcessSet | None = None, inplace: bool = False
) -> None:
    """Broadcast the state of models, layers, optimizers and variables from one rank to all ranks.

    For a model or layer, this is everything that Keras would save: its weights, the constants of `Normalization`, the
    vocabularies of `StringLookup`, `IntegerLookup` and `TextVectorization`, the bins of `Discretization`, and what a custom
    layer writes in `save_own_variables()` and `save_assets()`. Compiled models with such state trace their next step again.
    Random seeds and metrics are not broadcast: with equal seeds, dropout would drop the same units on all ranks. A model does
    not include its optimizer.

    Pass `model`, not `model.variables`, if it has adapted layers: variables do not contain a vocabulary. A user-defined
    `tf.function` or `dataset.map` keeps the constants that it was traced with, so broadcast before it is traced.

    Args:
        variables: One or several models, layers, optimizers, and Keras or TensorFlow variables (such as `model.variables`),
            built, and the same on all ranks.
        root_rank: The rank to broadcast from.
        process_set: The `hvd.ProcessSet` to broadcast in. Defaults to all ranks.
        inplace: Accepted for compatibility with Horovod; has no effect. Variables pass through host memory, one at a time.

    Raises:
        ValueError: On every rank, if the variables or layers of the ranks differ in number, shape or dtype; if a layer with an
            `adapt` method has different state on the ranks that cannot be broadcast; if variables of a `Normalization` differ
            and are passed without the layer.
        RuntimeError: In a `tf.function`, or if Horovod is missing or not initialized.

    Warns:
        UserWarning: On every rank: tensors, arrays or tables in attributes of a layer differ between ranks.

    Example:

    ```python
    if first_batch:  # the model and the optimizer are built
        broadcast_variables([model, optimizer], root_rank=0)
    ```
    """
    if not tf.executing_eagerly():
        raise RuntimeError("broadcast_variables() must be called outside a tf.function. Received: a call in a graph")
    single = isinstance(variables, keras.layers.Layer | keras.optimizers.Optimizer | keras.Variable | tf.Variable)
    items = [variables] if single else list(variables)
    roots = [item for item in items if isinstance(item, keras.layers.Layer)]
    given: list[Any] = []
    for item in items:
        if isinstance(item, keras.layers.Layer):
            given += item.weights
        elif isinstance(item, keras.optimizers.Optimizer):
            given += item.variables
        else:
            given.append(item)
    broadcast_state(given, roots, root_rank, process_set)


def broadcast_state(
    variables: Iterable[Any],
    roots: Sequence[keras.layers.Layer],
    root_rank: int,
    process_set: ProcessSet | None,
    local: Collection[int] = (),
) -> None:
    """Broadcast variables and the other state of models or layers from one rank; see `broadcast_variables`.

    `local` contains ids of `tf.Variable`s. These variables, and the state of layers that have one of them, are not broadcast.
    """
    variables = list({id(v): v for v in variables if id(backing(v)) not in local}.values())
    layers = [
        (path, layer)
        for path, layer in layer_state.all_layers(roots)
        if not any(id(backing(v)) in local for v in layer._trainable_variables + layer._non_trainable_variables)
    ]
    stateful = [(path, layer) for path, layer in layers if layer_state.is_stateful(layer)]
    owned = {id(v) for root in roots for v in root.weights}
    adapted = _normalizations([v for v in variables if id(v) not in owned])
    layout = [(tuple(v.shape), keras.backend.standardize_dtype(v.dtype), getattr(v, "path", v.name)) for v in variables]
    kinds = [(path, type(layer).__name__) for path, layer in stateful]
    group = ranks.find_horovod(process_set)
    gathered = group.gather((layout, kinds, adapted), "layout")
    _check_layouts([layout for layout, _, _ in gathered])
    if any([kind for _, kind in kinds] != [kind for _, kind in gathered[0][1]] for _, kinds, _ in gathered):
        raise ValueError(
            "All ranks must have the same layers with a vocabulary, constants or assets. "
            f"Received: by rank: {[kinds for _, kinds, _ in gathered]}"
        )
    # Names are not compared: Keras numbers objects per process.
    by_rank = [[values for _, values in adapted] for _, _, adapted in gathered]
    if any(values != by_rank[0] for values in by_rank):
        raise ValueError(
            "The variables of Normalization layers differ between ranks. The layers compute with constants derived from these "
            "variables, which are not broadcast with them. Pass the models or layers instead of their variables: "
            f"`broadcast_variables(model)`. Received: variables of {[layer for layer, _ in adapted]}"
        )
    if len(gathered) > 1:
        with tf.device("CPU:0"):
            for variable in variables:
                # As signed integers, because Horovod supports neither bfloat16 nor uint32 in TensorFlow.
                value = np.asarray(tf.convert_to_tensor(variable).numpy())
                bits = group.hvd.broadcast(value.view(f"i{value.itemsize}"), root_rank, process_set=group.process_set)
                variable.assign(np.asarray(bits.numpy()).view(value.dtype))
        if layers:
            _broadcast_layers(layers, stateful, root_rank, group)
    if stateful:  # also on one rank: its layers may have been adapted after the trace
        for root in roots:
            forget_traces(root)


def _check_layouts(layouts: list[list[tuple[Any, ...]]]) -> None:
    for by_rank in itertools.zip_longest(*layouts):
        if any(one is None or one[:2] != (by_rank[0] or ())[:2] for one in by_rank):
            raise ValueError(
                "The model and its optimizer must have the same variables on all ranks: build models, layers and optimizers on "
                f"every rank first. Received: {[len(layout) for layout in layouts]} variables by rank. The first difference by "
                f"rank, as (shape, dtype, path): {list(by_rank)}"
            )


def _broadcast_layers(layers: Any, stateful: Any, root_rank: int, group: Group) -> None:
    """Broadcast the state of layers outside their variables; raise on every rank if it cannot be set on one of them."""
    error = None
    if stateful:
        here = group.rank == root_rank
        state = layer_state.capture(stateful) if here else None
        options = {"name": "hvd_syncbn.layer_state", "process_set": group.process_set}
        state = group.hvd.broadcast_object(state, root_rank, **options)
        try:
            layer_state.restore(stateful, state)
        except ValueError as failure:
            error = str(failure)
    outcome = (error, layer_state.constants(layers))
    everyone = group.gather(outcome, "layer_state")
    errors = {rank: error for rank, (error, _) in enumerate(everyone) if error}
    if errors:
        raise ValueError(f"The layers' state was not broadcast. Received: by rank: {errors}")
    found = [constants for _, constants in everyone]
    places = dict.fromkeys(place for constants in found for place in constants)
    differing = {
        f"{layers[i][0]}.{name}": callable(getattr(layers[i][1], "adapt", None))
        for i, name in places
        if len({constants.get((i, name)) for constants in found}) > 1
    }
    refused = [name for name, adapts in differing.items() if adapts]
    if refused:
        raise ValueError(
            "Layers with an `adapt` method have state that cannot be broadcast and differs between ranks. Adapt them to the "
            "same data on all ranks, store the state in weights (`add_weight()`) with a method `finalize_state()`, or "
            f"implement `save_assets()` and `load_assets()`. Received: {refused}"
        )
    if differing:
        warnings.warn(
            "layers have tensors, arrays or tables that differ between ranks and are not broadcast. If this is not intended, "
            "store them in weights (`add_weight()`) or implement `save_assets()` and `load_assets()`. "
            f"Received: {list(differing)}",
            stacklevel=4,
        )


def _normalizations(variables: Iterable[Any]) -> list[tuple[str, list[bytes]]]:
    """Return the values of the variables that belong to `Normalization` layers, by layer path."""
    found: dict[str, dict[str, Any]] = {}
    for variable in variables:
        layer, _, name = str(getattr(variable, "path", "")).rpartition("/")
        if name in ("mean", "variance", "count") and not variable.trainable:
            found.setdefault(layer, {})[name] = np.asarray(variable.numpy())
    return [(layer, [v.tobytes() for v in values.values()]) for layer, values in found.items() if len(values) == 3]


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
    """Return the average of a value over all ranks, or another reduction `op`.

    The value is a number, a list, an array, a tensor or a variable. The other arguments are those of
    `horovod.tensorflow.keras.allreduce`; `options` are further arguments of `horovod.tensorflow.allreduce`, such as
    `process_set`.
    """
    hvd = ranks.require_to_communicate()
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
    """Return the concatenated values of all ranks, along the first axis.

    `options` are the other arguments of `horovod.tensorflow.allgather`.
    """
    return ranks.require_to_communicate().allgather(tf.convert_to_tensor(value), name=name, **options)


def broadcast(value: Any, root_rank: int, name: str | None = None, **options: Any) -> tf.Tensor:
    """Return the value of the root rank. `options` are the other arguments of `horovod.tensorflow.broadcast`."""
    return ranks.require_to_communicate().broadcast(tf.convert_to_tensor(value), root_rank, name=name, **options)


def reducescatter(value: Any, name: str | None = None, op: Any = None, **options: Any) -> tf.Tensor:
    """Return this rank's part of the average over all ranks, or of another reduction `op`.

    `options` are the other arguments of `horovod.tensorflow.reducescatter`.
    """
    hvd = ranks.require_to_communicate()
    return hvd.reducescatter(tf.convert_to_tensor(value), name=name, op=hvd.Average if op is None else op, **options)


class _DistributedGradientTape:
    """A `tf.GradientTape` whose `gradient()` averages over all ranks. Other attributes are those of the wrapped tape."""

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
        """Watch a tensor, or a TensorFlow or Keras variable."""
        self._tape.watch(keras.tree.map_structure(backing, tensor))

    def register_local_source(self, source: Any) -> None:
        """Exclude the gradient of a variable from averaging."""
        self._averager.register_local([source])

    def gradient(self, target: Any, sources: Any, output_gradients: Any = None, **options: Any) -> Any:
        """Return the gradients as `tf.GradientTape.gradient` does, averaged over the ranks.

        Args:
            target: Tensor, or structure of tensors, to differentiate.
            sources: Keras or TensorFlow variable, tensor, or a structure of these.
            output_gradients: Gradients of the elements of `target`.
            options: The other arguments of `tf.GradientTape.gradient`. Horovod's `use_generic_names` is accepted and has no
                effect: names do not depend on other objects of the process.
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
        """Return two lists of (source, gradient) pairs: the local gradients, and the averaged ones."""
        pairs = list(zip(sources, self.gradient(target, list(sources), output_gradients, **options), strict=True))
        local = self._averager.places(sources)
        chosen = [[pair for i, pair in enumerate(pairs) if (i in local) == which] for which in (True, False)]
        return chosen[0], chosen[1]


def _flatten_gradients(gradients: Any) -> list[Any]:
    return list(tf.nest.flatten(gradients, expand_composites=False))


def _unused_name() -> str:
    """Return a name that is the same on every rank and unique in a graph, whose exchanges TensorFlow may run concurrently."""
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
    """Make a `tf.GradientTape` return gradients that are averaged over all ranks, also for Keras 3 variables.

    Args:
        gradtape: The tape, before or after recording.
        device_dense: Accepted for compatibility with Horovod; has no effect.
        device_sparse: Accepted for compatibility with Horovod; has no effect.
        compression: A member of `hvd.Compression`, for dense gradients. Defaults to none.
        sparse_as_dense: Whether to convert `tf.IndexedSlices` to dense gradients.
        op: `hvd.Average`, the default, or `hvd.Sum`.
        gradient_predivide_factor: Dense gradients are divided by it before the sum, and multiplied by it after.
        num_groups: Accepted for compatibility with Horovod; has no effect. All gradients of one dtype are one group.
        groups: Accepted for compatibility with Horovod; has no effect.
        process_set: The `hvd.ProcessSet` to average over. Defaults to all ranks.
        scale_local_gradients: Whether gradients of sources registered with `register_local_source()` are divided by the number
            of ranks.

    Raises:
        TypeError: If `gradtape` is not a `tf.GradientTape`.
        ValueError: If `op` is neither of these, or `gradient_predivide_factor` is given with `hvd.Sum`.
        RuntimeError: If Horovod is missing or not initialized, or XLA compiles the step.

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
        raise TypeError(f"`gradtape` must be a `tf.GradientTape`. Received: {gradtape!r}")
    op = hvd.Average if op is None else op
    if op not in (hvd.Average, hvd.Sum):
        raise ValueError(f"`op` must be `hvd.Average` or `hvd.Sum`. Received: op={op}")
    if op == hvd.Sum and gradient_predivide_factor != 1.0:
        raise ValueError(
            "`gradient_predivide_factor` is only supported with `hvd.Average`. "
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
    """Make a tape average gradients over all ranks, except those of local layers.

    Args:
        gradtape: The tape.
        args: See `DistributedGradientTape`.
        local_layers: One or several layers, built, whose variables are local to each rank.
        kwargs: See `DistributedGradientTape`.

    Raises:
        ValueError: If `local_layers` contains anything but built layers.
    """
    variables = local_variables(local_layers)
    tape = DistributedGradientTape(gradtape, *args, **kwargs)
    for variable in variables:
        tape.register_local_source(variable)
    return tape
