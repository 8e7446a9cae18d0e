"""Callbacks for `model.fit` under Horovod."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from hvd_syncbn.tf_impl.keras import ranks

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet


class BroadcastVariablesCallback(keras.callbacks.Callback):
    """Gives all ranks the weights and the optimizer's state of one rank, whenever training starts.

    Metrics and random seeds stay each rank's own: equal seeds would drop the same units everywhere. It also turns
    off XLA for the model, which `compile()` turns on by itself where there is a GPU and which cannot compile
    Horovod's collectives.

    Args:
        root_rank: The rank whose variables are taken.
        process_set: The `hvd.ProcessSet` to broadcast in. Defaults to all ranks.

    Raises:
        ValueError: When training starts, on every rank, if the ranks' models or optimizers differ.

    Example:

    ```python
    model.fit(x, y, callbacks=[BroadcastVariablesCallback()])
    ```
    """

    def __init__(self, root_rank: int = 0, process_set: ProcessSet | None = None) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.process_set = process_set

    def set_model(self, model: keras.Model) -> None:
        """Turn off XLA: `fit()` calls this before it makes the training function."""
        super().set_model(model)
        model.jit_compile = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Broadcast, or leave it to the first step if the model waits for data to be built."""
        model, layers = self.model, self.model.layers
        if model.built or (layers and all(layer.built for layer in layers)):
            self._broadcast()
            return
        train_function = model.train_function

        def build_first(iterator: Any) -> Any:
            model.train_function = train_function
            x, _, _ = keras.utils.unpack_x_y_sample_weight(iterator.element_spec)
            model(tf.nest.map_structure(lambda spec: keras.KerasTensor((None, *spec.shape[1:]), spec.dtype.name), x))
            self._broadcast()
            return train_function(iterator)

        # Not after that step: its gradients would be those of different models.
        model.train_function = build_first

    def _broadcast(self) -> None:
        variables = list(self.model.weights)
        if self.model.optimizer is not None:
            if not self.model.optimizer.built:
                self.model.optimizer.build(self.model.trainable_variables)
            variables += self.model.optimizer.variables
        layout = [(tuple(v.shape), str(v.dtype)) for v in variables]
        layouts, hvd, process_set = ranks.gather(layout, "layout", self.process_set)
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
                value = np.asarray(variable.value.numpy())
                bits = hvd.broadcast(value.view(f"i{value.itemsize}"), self.root_rank, process_set=process_set)
                variable.assign(np.asarray(bits.numpy()).view(value.dtype))


class MetricAverageCallback(keras.callbacks.Callback):
    """Averages the logs of an epoch over all ranks.

    Must come before the callbacks that decide by them: `EarlyStopping`, `ModelCheckpoint`, `ReduceLROnPlateau`.
    Otherwise ranks decide differently, and one that stops alone leaves the others waiting.

    Args:
        process_set: The `hvd.ProcessSet` to average over. Defaults to all ranks.

    Raises:
        ValueError: At the end of an epoch, on every rank, if not all of them have logged the same names.

    Example:

    ```python
    model.fit(x, y, callbacks=[MetricAverageCallback(), keras.callbacks.EarlyStopping(monitor="loss")])
    ```
    """

    def __init__(self, process_set: ProcessSet | None = None) -> None:
        super().__init__()
        self.process_set = process_set

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Put the averages in place of this rank's values, for the callbacks that follow."""
        # None means no logs, but the other ranks may have some: take part all the same.
        logs = {} if logs is None else logs
        everyone, _, _ = ranks.gather(logs, "metrics", self.process_set)
        if any(other.keys() != logs.keys() for other in everyone):
            raise ValueError(
                "All ranks must log the same metrics (is there validation data on all of them?). "
                f"Received: by rank: {[sorted(other) for other in everyone]}"
            )
        for key in logs:
            mean = np.mean([other[key] for other in everyone], axis=0, dtype="float64")
            logs[key] = mean if np.ndim(mean) else float(mean)
