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

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet


def broadcast_variables(
    variables: Iterable[Any], root_rank: int = 0, process_set: ProcessSet | None = None, inplace: bool = False
) -> None:
    """Give all ranks the values that one rank's variables have.

    Args:
        variables: Variables of Keras or TensorFlow, as `model.variables` or `optimizer.variables` (no call in Keras 3), the same
            on all ranks.
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
