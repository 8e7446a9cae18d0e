"""Callbacks for `model.fit` under Horovod, with Horovod's names and arguments.

They are public in `hvd_syncbn.keras.callbacks`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from hvd_syncbn import horovod
from hvd_syncbn.tf_impl.keras import ranks
from hvd_syncbn.tf_impl.keras.training import backup, drift
from hvd_syncbn.tf_impl.keras.training.functions import broadcast_state
from hvd_syncbn.tf_impl.keras.training.optimizer import backing, is_new, optimizers_of

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet


class BroadcastVariablesCallback(keras.callbacks.Callback):
    """Broadcast the state of the model and its optimizers from one rank when training starts.

    The state is the weights, the other state of layers (constants of `Normalization`, vocabularies, bins: see
    `broadcast_variables`), and the variables of all optimizers of the model, in `model.optimizer` and in other attributes.
    Metrics and random seeds are not broadcast: with equal seeds, dropout would drop the same units on all ranks. The callback
    also disables XLA for the model. `compile()` enables XLA by default on a GPU, but it cannot compile Horovod's collectives.

    Args:
        root_rank: The rank to broadcast from.
        process_set: The `hvd.ProcessSet` to broadcast in. Defaults to all ranks.
        local_variables: One or several variables that are not broadcast.

    Raises:
        ValueError: When training starts, on every rank, if the models or optimizers of the ranks differ; if layers have state
            that differs and cannot be broadcast; if `keras.callbacks.BackupAndRestore` is used and cannot resume all ranks.

    Example:

    ```python
    model.fit(x, y, callbacks=[BroadcastVariablesCallback()])
    ```
    """

    def __init__(self, root_rank: int = 0, process_set: ProcessSet | None = None, local_variables: Any = None) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.process_set = process_set
        self._local_variables: list[Any] = []
        if local_variables is not None:
            for variable in local_variables if isinstance(local_variables, list | tuple | set) else [local_variables]:
                self.register_local_var(variable)

    def register_local_var(self, var: Any) -> None:
        """Exclude a variable from the broadcast."""
        if not hasattr(var, "assign"):
            raise ValueError(f"a local variable must be a Keras or TensorFlow variable. Received: {var!r}")
        self._local_variables.append(var)

    def set_model(self, model: keras.Model) -> None:
        """Disable XLA, and discard a training step that does not average. `fit()` calls this before it creates the step."""
        super().set_model(model)
        model.jit_compile = False
        if any(map(is_new, optimizers_of(model))):  # a step that was traced before does not average
            model.train_function = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Broadcast now, or in the first step if the model is built from the first batch."""
        backup.check_plain(_callbacks_of_fit() or [], self.process_set)
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
            return model.train_function(iterator)

        # Broadcast before the step: afterwards its gradients would come from different models.
        model.train_function = build_first

    def _broadcast(self) -> None:
        model = self.model
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        variables = [*model.weights, *(v for optimizer in optimizers_of(model) for v in optimizer.variables)]
        local = {id(backing(variable)) for variable in self._local_variables}
        broadcast_state(variables, [model], self.root_rank, self.process_set, local)
        if model.train_function is None:  # the traced step had different constants
            model.make_train_function()
        ranks.check_before_training(model, self.process_set)


class BroadcastGlobalVariablesCallback(BroadcastVariablesCallback):
    """`BroadcastVariablesCallback` with Horovod's name and arguments.

    Args:
        root_rank: The rank to broadcast from.
        device: Accepted for compatibility with Horovod; has no effect. Variables pass through host memory.
        local_variables: One or several variables that are not broadcast.
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None) -> None:
        super().__init__(root_rank, local_variables=local_variables)
        self.device = device


class MetricAverageCallback(keras.callbacks.Callback):
    """Average the logs of each epoch over all ranks, and keep the ranks consistent at the end of each epoch.

    Place it before callbacks that use the logs for decisions: `EarlyStopping`, `ModelCheckpoint`, `ReduceLROnPlateau`. At the
    end of every epoch:

    - If `stop_training` is set on some ranks only, all ranks stop, with a warning. With a `TerminateOnNaN`, this is checked
      after every batch.
    - The weights, optimizer state, learning rates and layer state of all ranks are compared (`check_ranks_agree`). A difference
      is an error; differences that may be rounding, and differences in buffers of unknown layers, are a warning. Variables that
      are local for `BroadcastVariablesCallback` or the optimizer are not compared.

    Args:
        process_set: The `hvd.ProcessSet` to average over. Defaults to all ranks.
        device: Accepted for compatibility with Horovod; has no effect. Logs are numbers in host memory.
        weighted: Whether to weight ranks by the number of their samples in the epoch (for names that start with `"val_"`: in
            the validation). Averages over samples then equal those of one process with all data, even if ranks have different
            numbers of samples. Defaults to `False`, as in Horovod.

    Raises:
        ValueError: When training starts, on every rank, if a callback that uses the logs precedes it. At the end of an epoch,
            on every rank, if ranks have logged different names; or with `weighted`, if the model has a custom `train_step()`
            and does not count its samples.
        RuntimeError: On every rank, if ranks are in different epochs or have different weights or other state.

    Example:

    ```python
    model.fit(x, y, callbacks=[MetricAverageCallback(), keras.callbacks.EarlyStopping(monitor="loss")])
    ```
    """

    def __init__(self, process_set: ProcessSet | None = None, *, device: str = "", weighted: bool = False) -> None:
        super().__init__()
        self.process_set = process_set
        self.device = device
        self.weighted = weighted
        self._samples: list[float | None] = [None, None]  # of training, of validation
        self._callbacks: list[Any] = [self]  # of the `fit()` that runs

    def set_model(self, model: keras.Model) -> None:
        """Store the list of callbacks, and append one that runs after all of them."""
        super().set_model(model)
        callbacks = _callbacks_of_fit()
        if callbacks is not None:
            self._callbacks = callbacks
            if not any(isinstance(other, _Agreement) and other.average is self for other in self._callbacks):
                self._callbacks.append(_Agreement(self))

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Run the training checks, and check the order of the callbacks."""
        ranks.check_before_training(self.model, self.process_set)
        too_early = [type(other).__name__ for other in self._callbacks[: self._callbacks.index(self)] if _decides(other)]
        everyone = self.meet("the start of fit()", too_early)
        if any(everyone) and len(everyone) > 1:
            raise ValueError(
                "callbacks that use the logs for decisions must come after MetricAverageCallback: before it, they see the "
                f"metrics of one rank only. Received: before it, by rank: {everyone}. Put MetricAverageCallback before them."
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Reset the sample counts."""
        self._samples = [None, None]

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Store the number of training samples before validation resets the count."""
        self._samples[0] = self._count()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Store the number of validation samples."""
        self._samples[1] = self._count()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Replace the logs by their averages, for the callbacks that follow."""
        # Other ranks may have logs even if this one has none, so take part in the collective.
        logs = {} if logs is None else logs
        if self._samples[0] is None:
            self._samples[0] = self._count()
        everyone = self.meet(f"the end of epoch {epoch}", (logs, self._samples))
        if any(other.keys() != logs.keys() for other, _ in everyone):
            raise ValueError(
                "All ranks must log the same metrics. Check that all of them have validation data. "
                f"Received: by rank: {[sorted(other) for other, _ in everyone]}"
            )
        for key in logs:
            weights = None
            if self.weighted:
                weights = [samples[key.startswith("val_")] for _, samples in everyone]
                if None in weights or not sum(weights):
                    raise ValueError(
                        "`weighted=True` needs the number of samples of each rank, but the model's custom `train_step()` or "
                        "`test_step()` does not count them. Use `weighted=False`. "
                        f"Received: logs[{key!r}] with samples by rank {weights}"
                    )
            mean = np.average(np.asarray([other[key] for other, _ in everyone], "float64"), axis=0, weights=weights)
            logs[key] = mean if np.ndim(mean) else float(mean)

    def meet(self, place: str, value: Any = None) -> list[Any]:
        """Return the values of all ranks, which must be at the same place in `fit()`.

        Raises:
            RuntimeError: On every rank, if they are not.
        """
        everyone = ranks.find_horovod(self.process_set).gather((place, value), "MetricAverageCallback")
        if len({there for there, _ in everyone}) > 1:
            raise RuntimeError(
                f"the ranks are at different places of `fit()`. Received: by rank: {[there for there, _ in everyone]}. Call "
                "`fit()` with the same `initial_epoch`, `epochs`, number of steps and callbacks on every rank."
            )
        return [one for _, one in everyone]

    def _count(self) -> float | None:
        # Keras weights the loss of a batch by its number of samples. A user-defined metric named "loss" may not.
        tracker = getattr(self.model, "_loss_tracker", None) if self.weighted else None
        return None if tracker is None else float(keras.ops.convert_to_numpy(tracker.count))


def _callbacks_of_fit() -> list[Any] | None:
    """Return the callbacks of the `fit()` that is running a callback; None outside `fit()`.

    Keras does not pass the list to its callbacks, but the list's method that calls them is on the stack.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), keras.callbacks.CallbackList):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"].callbacks


def _decides(callback: keras.callbacks.Callback) -> bool:
    """Return whether a callback uses the logs for decisions at the end of an epoch."""
    if isinstance(callback, keras.callbacks.ModelCheckpoint):
        return bool(callback.save_best_only)
    return hasattr(callback, "monitor")


class _Agreement(keras.callbacks.Callback):
    """Make ranks agree after all other callbacks have run. `MetricAverageCallback` appends it to the list of callbacks."""

    def __init__(self, average: MetricAverageCallback) -> None:
        super().__init__()
        self.average = average
        self._every_batch = False
        self._epoch = 0
        self._warned = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Determine whether any rank may stop within an epoch."""
        may_stop = any(isinstance(other, keras.callbacks.TerminateOnNaN) for other in self.average._callbacks)
        self._every_batch = any(self.average.meet("the start of fit()", may_stop))

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Raise if ranks are in different epochs, or if only some of them have ended training."""
        self._epoch = epoch
        self.average.meet(f"the start of epoch {epoch}")

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Stop if any rank does."""
        if self._every_batch:
            self._agree_to_stop(f"batch {batch} of epoch {self._epoch}")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Stop if any rank does, and compare the ranks."""
        self._agree_to_stop(f"the end of epoch {epoch}")
        self._compare()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Compare the ranks again, because other callbacks may have restored weights."""
        self.average.meet("the end of fit()")
        self._compare()

    def _agree_to_stop(self, place: str) -> None:
        stops = self.average.meet(place, bool(self.model.stop_training))
        if any(stops) and not all(stops):
            self.model.stop_training = True
            members = horovod.ranks_of(self.average.process_set) or range(len(stops))
            warnings.warn(
                f"all ranks stop training at {place}, because a callback has set `stop_training` on some of them. "
                f"Received: stop_training on ranks {[rank for rank, stop in zip(members, stops, strict=True) if stop]} only. "
                "Give every rank the same callbacks, after MetricAverageCallback.",
                stacklevel=2,
            )

    def _compare(self) -> None:
        callbacks = self.average._callbacks
        local = [v for one in callbacks if isinstance(one, BroadcastVariablesCallback) for v in one._local_variables]
        difference = drift.find_difference(self.model, None, local, self.average.process_set)
        if difference is not None and difference.is_fault:
            raise RuntimeError(difference.message)
        if difference is not None and not self._warned:
            self._warned = True
            warnings.warn(difference.message, stacklevel=2)


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Set the learning rate to `initial_lr * multiplier`, starting with epoch `start_epoch` and ending before `end_epoch`.

    `multiplier` is a function of the epoch, or a number `m` for the exponential decay `m ** (epoch - start_epoch)`. For a
    constant factor use a function: `lambda epoch: 0.1`. With `staircase`, the rate is set at the beginning of each epoch, and
    `epoch` is an integer. Otherwise it is set before every batch, with `epoch = full_epochs + batch / steps_per_epoch`. With
    `steps_per_execution`, it is set once per execution. At the end of every epoch, the rate is logged as `"lr"`.

    Momentum correction: the velocities of SGD and RMSprop contain past learning rates. When the rate changes, the velocities
    are scaled by `new_rate / old_rate`. This is equivalent to a larger momentum for one step
    ([Goyal et al., 2017](https://arxiv.org/abs/1706.02677), remark 3). Horovod changes the momentum instead, which in Keras 3
    is a constant of the compiled step. The results differ by rounding. With `nesterov=True`, Horovod corrects twice, and this
    callback once.

    Args:
        initial_lr: The learning rate to multiply, usually the rate for all ranks together.
        multiplier: A number, or a function of the epoch that returns a number.
        start_epoch: The first epoch in which the rate is set.
        end_epoch: The first epoch in which the rate is no longer set. `None`: the rate is set until training ends.
        staircase: Whether to set the rate once per epoch instead of once per batch.
        momentum_correction: Whether to correct the momentum of optimizers that have one.
        steps_per_epoch: The number of batches per epoch. Defaults to the number in `fit()`.
        optimizer: The optimizer to set. Defaults to `model.optimizer`. Required if the model has several optimizers and a
            custom `train_step()`.

    Raises:
        TypeError: When training starts, if the optimizer's learning rate is not a number that can be set (it is a
            `LearningRateSchedule` or a function), or the optimizer is a `MultiOptimizer`, which has several.
        ValueError: If `initial_lr` is `None`; when training starts, if the number of steps is needed and not known, or if the
            model has several optimizers and `optimizer` is needed.

    Example:

    ```python
    schedule = [
        LearningRateWarmupCallback(initial_lr, warmup_epochs=5),
        LearningRateScheduleCallback(initial_lr, lambda epoch: 0.1, start_epoch=30, end_epoch=60),
        LearningRateScheduleCallback(initial_lr, lambda epoch: 0.01, start_epoch=60),
    ]
    ```
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: float = 0,
        end_epoch: float | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        *,
        optimizer: keras.optimizers.Optimizer | None = None,
    ) -> None:
        super().__init__()
        if initial_lr is None:
            raise ValueError("`initial_lr` is required. Received: initial_lr=None")
        self.initial_lr = initial_lr
        self.start_epoch = start_epoch
        self.end_epoch: Any = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch: Any = steps_per_epoch
        self.optimizer = optimizer
        self.current_epoch: int | None = None
        self.multiplier: Callable[[float], float] = (
            multiplier if callable(multiplier) else lambda epoch: multiplier ** (epoch - start_epoch)
        )

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Check the optimizers and the number of steps."""
        held = optimizers_of(self.model)
        if self.optimizer is None and len(held) > 1 and type(self.model).train_step is not keras.Model.train_step:
            raise ValueError(
                f"model {self.model.name!r} has several optimizers, and its custom `train_step()` may apply any of them. Use "
                f"one callback for each optimizer: {type(self).__name__}(..., optimizer=optimizer). "
                f"Received: optimizer=None, with {[one.name for one in held]}"
            )
        self._optimizer()
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ValueError(
                    "the number of steps per epoch is not known, because the data has no length. Pass `steps_per_epoch` to "
                    f"`fit()` or to {type(self).__name__}(). Received: steps_per_epoch={self.steps_per_epoch}"
                )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Store the epoch."""
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Set the learning rate before the first batch of an epoch or before every batch."""
        epoch = self.current_epoch
        if epoch is None or epoch < self.start_epoch or (self.end_epoch is not None and epoch >= self.end_epoch):
            return
        if not self.staircase:
            self._adjust(epoch + batch / self.steps_per_epoch)
        elif batch == 0:
            self._adjust(epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Log the learning rate."""
        if logs is not None:
            logs["lr"] = self._learning_rate()

    def _optimizer(self) -> keras.optimizers.Optimizer:
        """Return the optimizer that has the learning rate."""
        optimizer = self.model.optimizer if self.optimizer is None else self.optimizer
        while hasattr(optimizer, "inner_optimizer"):
            optimizer = optimizer.inner_optimizer
        rate = "several" if hasattr(optimizer, "optimizers") else getattr(optimizer, "_learning_rate", None)
        if not isinstance(rate, keras.Variable):
            raise TypeError(
                f"{type(self).__name__} needs an optimizer whose learning rate is a single number. Create the optimizer with a "
                "number, or keep its schedule and remove the callback. "
                f"Received: {type(optimizer).__name__} with learning_rate={rate}"
            )
        return optimizer

    def _learning_rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self._optimizer().learning_rate))

    def _adjust(self, epoch: float) -> None:
        optimizer = self._optimizer()
        old = self._learning_rate()
        optimizer.learning_rate = self.initial_lr * self.multiplier(epoch)
        new = self._learning_rate()
        if self.momentum_correction and old and new != old:  # a rate of 0 cannot be divided by
            for velocity in _velocities(optimizer):
                velocity.assign(velocity * (new / old))


def _velocities(optimizer: keras.optimizers.Optimizer) -> Sequence[keras.Variable]:
    """Return the variables of an optimizer that are sums of gradients times learning rates."""
    if isinstance(optimizer, keras.optimizers.SGD):
        return getattr(optimizer, "momentums", ())
    if isinstance(optimizer, keras.optimizers.RMSprop):
        return getattr(optimizer, "_momentums", ())
    return ()


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Increase the learning rate linearly from `initial_lr / hvd.size()` to `initial_lr`.

    With `epoch = full_epochs + (batch + 1) / steps_per_epoch`, the rate is
    `initial_lr / size * (epoch * (size - 1) / warmup_epochs + 1)`, so the last batch of the last warmup epoch uses
    `initial_lr`. See [Goyal et al., 2017](https://arxiv.org/abs/1706.02677) and `LearningRateScheduleCallback`.

    Args:
        initial_lr: The learning rate for all ranks together, which is reached at the end of the warmup.
        warmup_epochs: The number of warmup epochs.
        momentum_correction: Whether to correct the momentum of optimizers that have one.
        steps_per_epoch: The number of batches per epoch. Defaults to the number in `fit()`.
        optimizer: See `LearningRateScheduleCallback`.
        verbose: 1 to print a line on rank 0 when the warmup is finished.

    Example:

    ```python
    model.compile(DistributedOptimizer(keras.optimizers.SGD(0.1 * hvd.size(), momentum=0.9)), loss)
    model.fit(data, callbacks=[LearningRateWarmupCallback(0.1 * hvd.size(), warmup_epochs=5), ...])
    ```
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: float = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
        *,
        optimizer: keras.optimizers.Optimizer | None = None,
    ) -> None:
        def multiplier(epoch: float) -> float:
            # Read the size in every step: it may change in an elastic job.
            size = ranks.require().size()
            epoch += 1.0 / self.steps_per_epoch
            return 1.0 / size * (epoch * (size - 1) / warmup_epochs + 1)

        super().__init__(
            initial_lr,
            multiplier,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
            optimizer=optimizer,
        )
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Log the learning rate, and print a line when the warmup is finished."""
        super().on_epoch_end(epoch, logs)
        if self.verbose > 0 and epoch == self.end_epoch - 1 and ranks.require().rank() == 0:
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {self._learning_rate():g}.")


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """`keras.callbacks.ModelCheckpoint` that saves the best model, on one rank.

    Use it on all ranks or on the writing rank only. Only one rank writes, because several would corrupt the file. After
    `MetricAverageCallback`, the best model is chosen by the averages over all ranks.

    Args:
        monitor: The name in the logs to monitor.
        verbose: Verbosity mode, 0 or 1.
        save_weights_only: Whether to save only the weights.
        mode: One of `"auto"`, `"min"`, `"max"`.
        save_freq: `"epoch"`, or a number of batches.
        filepath: Where to save: `"best.keras"`, or `"best.weights.h5"` for weights only. It may contain names of the logs, as
            in Keras. As in Horovod, the attribute `filepath` may be set before training instead.
        root_rank: The rank that writes.

    Raises:
        ValueError: If `filepath` does not have the file extension that Keras requires; when training starts, if there is no
            `filepath`.

    Example:

    ```python
    model.fit(data, callbacks=[MetricAverageCallback(), BestModelCheckpoint(filepath="best.keras"), ...])
    ```
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        *,
        filepath: Any = None,
        root_rank: int = 0,
    ) -> None:
        # Keras checks the file extension here.
        ending = "later.weights.h5" if save_weights_only else "later.keras"
        super().__init__(ending if filepath is None else filepath, monitor, verbose, True, save_weights_only, mode, save_freq)
        if filepath is None:
            self.filepath: Any = None
        self.root_rank = root_rank

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Check `filepath` before training, and run the training checks."""
        super().on_train_begin(logs)
        if self.filepath is None:
            raise ValueError("BestModelCheckpoint needs a path to save to: pass `filepath`. Received: filepath=None")
        self.filepath = str(self.filepath)
        ranks.check_before_training(self.model)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save on one rank, if `save_freq` is a number."""
        if ranks.require().rank() == self.root_rank:
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Save on one rank, if `save_freq` is `"epoch"`."""
        if ranks.require().rank() == self.root_rank:
            super().on_epoch_end(epoch, logs)
