"""`check_ranks_agree`: check that all ranks have the same model and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from hvd_syncbn import drift, horovod
from hvd_syncbn.drift import Difference, Entry
from hvd_syncbn.tf_impl.keras import layer_state, ranks
from hvd_syncbn.tf_impl.keras.layer import SyncBatchNormalization
from hvd_syncbn.tf_impl.keras.training.optimizer import backing, optimizers_of

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet


def check_ranks_agree(
    model: keras.Model, optimizer: Any = None, *, local: Iterable[Any] = (), process_set: ProcessSet | None = None
) -> None:
    """Raise an error on every rank if weights, optimizer state, learning rates or layer state differ between ranks.

    All ranks must call it together, for example at the end of every epoch. In `fit()`, `MetricAverageCallback` calls it. Ranks
    compare digests of the bytes: this takes one small allgather, and about 30 ms for 25 million parameters and their momentum.
    Layer state includes vocabularies and constants from `adapt`. Values that differ between ranks by design are not compared:
    metrics, random seeds, states of RNNs, statistics of unsynchronized norms, local variables of an optimizer, and `local`.
    Norms that are synchronized in a process set, and optimizers that average in one, are compared within that process set.

    Args:
        model: The model.
        optimizer: One or several optimizers. Defaults to those of the model.
        local: Layers and variables that differ between ranks by design.
        process_set: The `hvd.ProcessSet` of the ranks to compare. Defaults to all ranks.

    Raises:
        TypeError: If `model` is not a model, `optimizer` not an optimizer, or `local` contains anything but layers and
            variables.
        RuntimeError: If the ranks differ: the message names the first difference, the ranks, and likely causes. Or if Horovod
            is missing or not initialized.

    Example:

    ```python
    for epoch in range(epochs):
        for x, y in batches:
            train_step(x, y)
        check_ranks_agree(model, optimizer)
    ```
    """
    difference = find_difference(model, optimizer, local, process_set)
    if difference is not None:
        raise RuntimeError(difference.message)


def find_difference(model: Any, optimizer: Any, local: Iterable[Any], process_set: ProcessSet | None) -> Difference | None:
    """Return the difference for which `check_ranks_agree` raises an error, or None."""
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"expected a Keras 3 model or layer. Received: {type(model).__module__}.{type(model).__name__}")
    if optimizer is None:
        optimizers = optimizers_of(model)
    else:
        optimizers = [optimizer] if isinstance(optimizer, keras.optimizers.Optimizer) else list(optimizer)
    for one in optimizers:
        if not isinstance(one, keras.optimizers.Optimizer):
            raise TypeError(f"expected a keras.optimizers.Optimizer or a list of them. Received: {type(one).__name__}")
    own = _own(model, optimizers, local)
    group = ranks.find_horovod(process_set)
    if group.size == 1:
        return None
    return drift.find_difference(
        lambda: _entries(model, optimizers, own),
        group.rank,
        group.ranks,
        lambda value: group.gather(value, "check_ranks_agree"),
    )


def _own(model: keras.layers.Layer, optimizers: Iterable[Any], local: Iterable[Any]) -> set[int]:
    """Return the ids of the TensorFlow variables and layers that are local to each rank."""
    found: list[Any] = []
    for one in local:
        if isinstance(one, keras.layers.Layer):
            found += [*one.variables, *one._flatten_layers()]
        elif hasattr(one, "assign"):
            found.append(one)
        else:
            raise TypeError(f"expected layers and variables in `local`. Received: {type(one).__name__}")
    for optimizer in optimizers:
        for averager in _averagers(optimizer):
            found += averager.local_variables.values()
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) and not isinstance(layer, SyncBatchNormalization):
            found += layer.non_trainable_variables if layer.trainable else ()
        elif isinstance(layer, keras.layers.RNN) and layer.stateful:
            found += keras.tree.flatten(layer.states)
    return {id(backing(variable)) for variable in found}


def _entries(model: Any, optimizers: Sequence[Any], own: set[int]) -> Iterator[Entry]:
    """Yield the values that must be the same on all ranks, causes of differences before their consequences."""
    for optimizer in optimizers:
        for variable in optimizer.variables:
            if _is_rate(variable):
                yield Entry(drift.LEARNING_RATE, variable.path, _value(variable), _scope(optimizer))
    layers = list(model._flatten_layers())
    # Weights that were created as trainable, including frozen ones.
    learned = {id(variable.value) for layer in layers for variable in layer._trainable_variables}
    known = set(own)
    for path, layer in layer_state.all_layers([model]):
        if id(layer) in own:
            continue
        if hasattr(layer, "adapt"):
            known.update(id(variable.value) for variable in layer.weights)
            for name, value in _adapted(layer):
                yield Entry(drift.LAYER_STATE, f"{path}.{name}", value)
        for name, value in _flat(layer_state.capture([(path, layer)])[0][1]):
            # A custom class may count the data of its rank.
            custom = name.startswith(("raw_variables", "store", "assets"))
            yield Entry(drift.OTHER if custom else drift.LAYER_STATE, f"{path}.{name}", value)
    statistics = []
    for layer in layers:
        if isinstance(layer, SyncBatchNormalization):
            members = horovod.ranks_of(layer.process_set)
            of_layer = [variable for variable in layer.weights if id(variable.value) not in known | learned]
            statistics += [(variable, None if members is None else tuple(members)) for variable in of_layer]
            known.update(id(variable.value) for variable in of_layer)
    others = [variable for variable in model.weights if id(variable.value) not in known]
    scope = _scope(getattr(model, "optimizer", None) or (optimizers[0] if optimizers else None))
    for variable in others:
        if id(variable.value) in learned:
            yield Entry(drift.WEIGHT, variable.path, _value(variable), scope)
    prefixes = tuple(f"{v.path.replace('/', '_')}_" for v in model.weights if id(v.value) in own)
    for optimizer in optimizers:
        for variable in optimizer.variables:
            # The name of a slot variable begins with the path of its variable.
            if not _is_rate(variable) and not variable.name.startswith(prefixes):
                yield Entry(drift.OPTIMIZER_STATE, variable.path, _value(variable), _scope(optimizer))
    for variable, among in statistics:
        yield Entry(drift.STATISTICS, variable.path, _value(variable), among)
    for variable in others:
        if id(variable.value) not in learned:
            yield Entry(drift.OTHER, variable.path, _value(variable))


def _adapted(layer: Any) -> Iterator[tuple[str, Any]]:
    """Yield the variables of a preprocessing layer and the constants derived from them."""
    for variable in layer.weights:
        yield variable.name, _value(variable)
    for name in ("mean", "variance"):
        value = getattr(layer, name, None)
        if value is not None:
            yield name, np.asarray(keras.ops.convert_to_numpy(value))


def _flat(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        for key, part in value.items() if isinstance(value, dict) else [("", value)]:
            yield f"{name}.{key}" if key else name, part


def _is_rate(variable: Any) -> bool:
    return bool(variable.name == "learning_rate")


def _averagers(optimizer: Any) -> list[Any]:
    """Return the averagers of an optimizer and of those inside it (LossScaleOptimizer, MultiOptimizer)."""
    own = getattr(optimizer, "_averager", None)
    inner = getattr(optimizer, "inner_optimizer", None)
    direct = getattr(optimizer, "optimizers", ()) if inner is None else [inner]
    return [one for one in [own, *(a for member in direct for a in _averagers(member))] if one is not None]


def _scope(optimizer: Any) -> tuple[int, ...] | None:
    members = next((horovod.ranks_of(averager.given_process_set) for averager in _averagers(optimizer)), None)
    return None if members is None else tuple(members)


def _value(variable: Any) -> Any:
    """Return a variable's value as an array of a NumPy dtype, without a copy if possible."""
    array = np.asarray(tf.convert_to_tensor(backing(variable)))
    return array.astype(np.float32) if array.dtype.kind == "V" else array  # bfloat16, float8: exact


__all__ = ["check_ranks_agree"]
