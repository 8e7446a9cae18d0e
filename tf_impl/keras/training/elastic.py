"""Elastic jobs: `model.fit` continues when workers fail, leave or join.

A traced step reads the number of ranks when it runs (`HOROVOD_ELASTIC`), so it need not be traced again.
`hvd_syncbn.keras.elastic` is the public module.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError

from hvd_syncbn.tf_impl.keras import layer_state, ranks
from hvd_syncbn.tf_impl.keras.convert import forget_traces
from hvd_syncbn.tf_impl.keras.training.functions import broadcast_state
from hvd_syncbn.tf_impl.keras.training.optimizer import forget_gradients, optimizers_of, require_built


@contextlib.contextmanager
def _internal_errors() -> Iterator[None]:
    """Convert TensorFlow's errors for failed collectives to `HorovodInternalError`, after which Horovod restores the state."""
    try:
        yield
    except (tf.errors.UnknownError, tf.errors.AbortedError) as error:
        if "Horovod" not in error.message:
            raise
        raise HorovodInternalError(error) from error


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a training function, which is restarted from the last commit when the set of ranks changes.

    Args:
        func: Function whose first argument is a `State`. It must not call collectives before it trains from that state, because
            a new worker starts it while the other workers are training.

    Example:

    ```python
    @elastic.run
    def train(state):
        state.model.fit(data, initial_epoch=state.epoch, epochs=90, callbacks=[...])

    train(elastic.KerasState(model, batch=0, epoch=0))
    ```
    """

    @functools.wraps(func)
    def attempt(state: Any, *args: Any, **kwargs: Any) -> Any:
        with _internal_errors():
            return func(state, *args, **kwargs)

    def reset() -> None:
        hvd = ranks.require()
        hvd.shutdown()
        hvd.init()

    return run_fn(attempt, reset)


class KerasState(ObjectState):
    """The last committed state of a Keras 3 model and its optimizers, in memory.

    It contains the model's weights, random seeds and other layer state (constants of `Normalization`, vocabularies: see
    `broadcast_variables`) and the variables of all optimizers of the model. When the set of ranks changes, all ranks receive
    the state of rank 0, except random seeds: with equal seeds, dropout would drop the same units on all ranks. Metrics are
    reset by `fit()`. Gradients that `backward_passes_per_step` has not applied yet are discarded on all ranks.

    Args:
        model: Keras model, built and, unless `optimizer` is given, compiled.
        optimizer: Optimizer, if it is not `model.optimizer`.
        kwargs: Other values to save, which become attributes: `batch=0, epoch=0`. They may be further built models, layers and
            optimizers: `discriminator=d, d_optimizer=optimizer`.

    Raises:
        TypeError: `model` or `optimizer` is a list, or a keyword argument is a list of models, layers or optimizers.
        ValueError: The model or an optimizer is not built, or there is no optimizer.

    Example:

    ```python
    state = elastic.KerasState(model, batch=0, epoch=0)
    state.register_reset_callbacks([lambda: setattr(model.optimizer, "learning_rate", 0.01 * hvd.size())])
    ```
    """

    def __init__(self, model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None, **kwargs: Any) -> None:
        _refuse_lists({"model": model, "optimizer": optimizer} | kwargs)
        if not isinstance(model, keras.layers.Layer):
            raise TypeError(f"`model` must be a single Keras 3 model. Received: {model!r}")
        if not model.built:
            raise ValueError(
                f"the model must be built first: call `model.build(input_shape)`. Received: {model.name!r}, not built"
            )
        optimizer = getattr(model, "optimizer", None) if optimizer is None else optimizer
        if optimizer is None:
            raise ValueError(f"compile the model, or pass `optimizer`. Received: {model.name!r} without an optimizer")
        hvd = ranks.require()
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        self.model = model
        self.optimizer = optimizer
        kept = {name: value for name, value in kwargs.items() if isinstance(value, _KERAS)}
        for name, value in kept.items():
            if not value.built and not isinstance(value, layer_state.NEVER_BUILT):
                raise ValueError(f"{name!r} must be built first: call its `build()`. Received: {value!r}, not built")
            setattr(self, name, value)
        self._roots = [model, *(value for value in kept.values() if isinstance(value, keras.layers.Layer))]
        self._optimizers = [optimizer, *(value for value in kept.values() if isinstance(value, keras.optimizers.Optimizer))]
        for root in self._roots:
            if isinstance(root, keras.Model):
                require_built(root)
        self._save_variables()
        others = {name: value for name, value in kwargs.items() if name not in kept}
        super().__init__(bcast_object=hvd.broadcast_object, get_rank=hvd.rank, **others)

    def save(self) -> None:
        """Save the current values."""
        self._save_variables()
        super().save()

    def restore(self) -> None:
        """Restore the saved values."""
        for variable, value in self._values:
            variable.assign(value)
        layer_state.restore(self._layers, self._layer_states)
        for root in self._roots if self._layers else ():
            forget_traces(root)
        self._forget_gradients()
        super().restore()

    def sync(self) -> None:
        """Broadcast the values of rank 0, and save them."""
        seeds = {id(v) for root in self._roots for v in root.variables} - {id(v) for root in self._roots for v in root.weights}
        with _internal_errors():  # a rank may fail during the broadcast
            variables = [variable for variable in self._variables() if id(variable) not in seeds]
            broadcast_state(variables, self._roots, 0, None)
        self._forget_gradients()
        self._save_variables()
        with _internal_errors():
            super().sync()
        ranks.check_before_training(self.model)

    def _every_optimizer(self) -> list[Any]:
        held = [optimizer for root in self._roots for optimizer in optimizers_of(root)]
        return list({id(optimizer): optimizer for optimizer in [*self._optimizers, *held]}.values())

    def _variables(self) -> list[Any]:
        variables = [v for root in self._roots for v in root.variables]
        variables += [v for optimizer in self._every_optimizer() for v in optimizer.variables]
        return list({id(variable): variable for variable in variables}.values())

    def _save_variables(self) -> None:
        self._values = [(variable, np.array(keras.ops.convert_to_numpy(variable))) for variable in self._variables()]
        self._layers = [named for named in layer_state.all_layers(self._roots) if layer_state.is_stateful(named[1])]
        self._layer_states = layer_state.capture(self._layers)

    def _forget_gradients(self) -> None:
        for optimizer in self._every_optimizer():
            forget_gradients(optimizer)


_KERAS = (keras.layers.Layer, keras.optimizers.Optimizer)


def _refuse_lists(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if not isinstance(value, _KERAS) and any(isinstance(item, _KERAS) for item in keras.tree.flatten(value)):
            raise TypeError(
                "pass each model, layer and optimizer as a separate keyword argument: `KerasState(model, d_optimizer=first, "
                f"g_optimizer=second)`. Those in attributes of the model need not be passed. Received: {name}={value!r}"
            )


TensorFlowKerasState = KerasState


class CommitStateCallback(keras.callbacks.Callback):
    """Commit a state every `batches_per_commit` batches, and at the end of every epoch.

    Place it after the callbacks that update the state, so that their updates are committed.

    Args:
        state: The `State`.
        batches_per_commit: The number of batches between commits. A commit copies the model to host memory and checks whether
            workers have joined or left.
    """

    def __init__(self, state: Any, batches_per_commit: int = 1) -> None:
        super().__init__()
        if not isinstance(batches_per_commit, int) or batches_per_commit < 1:
            raise ValueError(f"`batches_per_commit` must be an integer >= 1. Received: batches_per_commit={batches_per_commit}")
        self.state = state
        self.batches_per_commit = batches_per_commit
        self.batches_remaining = batches_per_commit

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Reset the count, so that it is the same on all ranks after a reset."""
        self.batches_remaining = self.batches_per_commit

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Commit if a commit is due. After the last batch of an epoch, `on_epoch_end` commits."""
        self.batches_remaining -= 1
        if self.batches_remaining == 0 and batch + 1 != self.params.get("steps"):
            self.batches_remaining = self.batches_per_commit
            self.state.commit()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Commit."""
        self.batches_remaining = self.batches_per_commit
        self.state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Store the number of finished batches of the epoch in `state.batch`, and shorten the first epoch after a reset by it.

    The shortened epoch reads its batches from the start of the data. To train on exactly the remaining batches, pass data that
    starts with them: `batches.repeat().skip(state.epoch * steps + state.batch)` and `steps_per_epoch=steps`.

    Args:
        state: The `State`, with an attribute `batch`.
    """

    # Truthy, and distinct from values that other callbacks set.
    _SHORTENED = "the rest of this epoch was done before the reset"

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self.steps_per_epoch: int | None = None
        self._done_before = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Store the number of steps."""
        self.steps_per_epoch = self.params.get("steps")
        self._done_before = self.state.batch

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Set the number of steps of the progress bar."""
        if self.steps_per_epoch:
            self.params["steps"] = self.steps_per_epoch - self._done_before

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count the batch, and end a shortened epoch after its last batch."""
        self.state.batch = self._done_before + batch + 1
        if self._done_before and self.steps_per_epoch and self.state.batch >= self.steps_per_epoch:
            self.model.stop_training = self.model.stop_training or self._SHORTENED

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Reset the count, so that the next epoch is complete."""
        self.state.batch = self._done_before = 0
        if self.model.stop_training == self._SHORTENED:
            self.model.stop_training = False


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Store the number of finished epochs in `state.epoch`.

    Call `fit()` with `initial_epoch=state.epoch, epochs=90` (which learning rate schedules need) or with
    `epochs=90 - state.epoch`.

    Args:
        state: The `State`, with an attribute `epoch`.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self.initial_epoch: int | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Reset the offset of the previous `fit()`."""
        self.initial_epoch = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Determine the offset between the epochs of `fit()` and of the state."""
        if self.initial_epoch is None:
            self.initial_epoch = self.state.epoch - epoch

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Count the epoch."""
        self.state.epoch = (self.initial_epoch or 0) + epoch + 1


__all__ = [
    "CommitStateCallback",
    "KerasState",
    "TensorFlowKerasState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]
