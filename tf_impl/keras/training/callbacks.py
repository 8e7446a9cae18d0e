"""Callbacks for `model.fit` under Horovod, by Horovod's names and with its arguments.

`hvd_syncbn.keras.callbacks` is their namespace.
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
    """Gives all ranks the state of one rank's model and optimizers, whenever training starts.

    That is the weights, what layers keep besides (constants of `Normalization`, vocabularies, bins: see
    `broadcast_variables`), and the variables of every optimizer that the model holds, in `model.optimizer` and in other
    attributes. Metrics and random seeds stay each rank's own: equal seeds would drop the same units everywhere. It also turns
    off XLA for the model, which `compile()` turns on by itself where there is a GPU and which cannot compile
    Horovod's collectives.

    Args:
        root_rank: The rank whose variables are taken.
        process_set: The `hvd.ProcessSet` to broadcast in. Defaults to all ranks.
        local_variables: A variable, or several, that stay each rank's own.

    Raises:
        ValueError: When training starts, on every rank, if the ranks' models or optimizers differ; if layers have state that
            differs and cannot be broadcast; if `keras.callbacks.BackupAndRestore` is used where it cannot resume all ranks.

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
        """Leave a variable to each rank. Only for one that is no broadcast of another rank's is needed."""
        if not hasattr(var, "assign"):
            raise ValueError(f"a local variable has to be a Keras or TensorFlow variable. Received: {var!r}")
        self._local_variables.append(var)

    def set_model(self, model: keras.Model) -> None:
        """Turn off XLA, and see to it that gradients are averaged: `fit()` calls this before it makes the training function."""
        super().set_model(model)
        model.jit_compile = False
        if any(map(is_new, optimizers_of(model))):  # and the step, if it was traced before, does not know that
            model.train_function = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Broadcast, or leave it to the first step if the model waits for data to be built."""
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

        # Not after that step: its gradients would be those of different models.
        model.train_function = build_first

    def _broadcast(self) -> None:
        model = self.model
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        variables = [*model.weights, *(v for optimizer in optimizers_of(model) for v in optimizer.variables)]
        local = {id(backing(variable)) for variable in self._local_variables}
        broadcast_state(variables, [model], self.root_rank, self.process_set, local)
        if model.train_function is None:  # the step that was traced had other constants
            model.make_train_function()
        ranks.check_before_training(model, self.process_set)


class BroadcastGlobalVariablesCallback(BroadcastVariablesCallback):
    """`BroadcastVariablesCallback` by Horovod's name and with its arguments.

    Args:
        root_rank: The rank whose variables are taken.
        device: What Horovod takes and this has no use for: variables go through the host's memory.
        local_variables: A variable, or several, that stay each rank's own.
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None) -> None:
        super().__init__(root_rank, local_variables=local_variables)
        self.device = device


class MetricAverageCallback(keras.callbacks.Callback):
    """Averages the logs of an epoch over all ranks, and has ranks agree on what other callbacks decide by them.

    Comes before the callbacks that decide: `EarlyStopping`, `ModelCheckpoint`, `ReduceLROnPlateau`. At the end of every epoch:

    - If `stop_training` is set on some ranks only, all ranks stop, with a warning. With a `TerminateOnNaN` they agree on that
      after every batch.
    - All ranks must hold the same weights, optimizer state, learning rates and layer state (`check_ranks_agree`). What differs
      by rounding, and buffers of layers that are not known, are a warning. What `BroadcastVariablesCallback` or the optimizer
      leave to each rank is left out.

    Args:
        process_set: The `hvd.ProcessSet` to average over. Defaults to all ranks.
        device: What Horovod takes and this has no use for: logs are numbers in the host's memory.
        weighted: Whether a rank counts by the samples that it has seen in the epoch (for what starts with `"val_"`: in its
            validation), instead of all ranks alike. Then means over samples are those of one process with all the data, also
            where ranks have different numbers of them. Defaults to `False`, as in Horovod.

    Raises:
        ValueError: When training starts, on every rank, if a callback that decides comes before it. At the end of an epoch, on
            every rank, if not all of them have logged the same names; or if `weighted` and the model does not count its
            samples, because it has a `train_step()` of its own.
        RuntimeError: On every rank, if ranks are in different epochs, or have drifted apart.

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
        """Take note of the other callbacks, and add one that comes after all of them."""
        super().set_model(model)
        callbacks = _callbacks_of_fit()
        if callbacks is not None:
            self._callbacks = callbacks
            if not any(isinstance(other, _Agreement) and other.average is self for other in self._callbacks):
                self._callbacks.append(_Agreement(self))

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Look at what trains, and at the order of the callbacks."""
        ranks.check_before_training(self.model, self.process_set)
        too_early = [type(other).__name__ for other in self._callbacks[: self._callbacks.index(self)] if _decides(other)]
        everyone = self.meet("the start of fit()", too_early)
        if any(everyone) and len(everyone) > 1:
            raise ValueError(
                "callbacks that decide by the logs have to come after MetricAverageCallback: before it they see the metrics of "
                f"their rank alone. Received: before it, by rank: {everyone}. Put MetricAverageCallback before them."
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Forget the samples of the epoch before."""
        self._samples = [None, None]

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Look at the samples of training before validation starts to count its own."""
        self._samples[0] = self._count()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Look at the samples of validation."""
        self._samples[1] = self._count()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Put the averages in place of this rank's values, for the callbacks that follow."""
        # None means no logs, but the other ranks may have some: take part all the same.
        logs = {} if logs is None else logs
        if self._samples[0] is None:
            self._samples[0] = self._count()
        everyone = self.meet(f"the end of epoch {epoch}", (logs, self._samples))
        if any(other.keys() != logs.keys() for other, _ in everyone):
            raise ValueError(
                "All ranks must log the same metrics (is there validation data on all of them?). "
                f"Received: by rank: {[sorted(other) for other, _ in everyone]}"
            )
        for key in logs:
            weights = None
            if self.weighted:
                weights = [samples[key.startswith("val_")] for _, samples in everyone]
                if None in weights or not sum(weights):
                    raise ValueError(
                        "`weighted=True` needs to know the samples that each rank has seen, and the model does not count them: "
                        "it has a `train_step()` or a `test_step()` of its own. Average without. "
                        f"Received: logs[{key!r}] with samples by rank {weights}"
                    )
            mean = np.average(np.asarray([other[key] for other, _ in everyone], "float64"), axis=0, weights=weights)
            logs[key] = mean if np.ndim(mean) else float(mean)

    def meet(self, place: str, value: Any = None) -> list[Any]:
        """Return the values of all ranks, which have to be at the same place in `fit()`.

        Raises:
            RuntimeError: On every rank, if they are not.
        """
        everyone = ranks.find_horovod(self.process_set).gather((place, value), "MetricAverageCallback")
        if len({there for there, _ in everyone}) > 1:
            raise RuntimeError(
                f"the ranks are at different places of `fit()`. Received: by rank: {[there for there, _ in everyone]}. Call it "
                "with the same `initial_epoch`, `epochs`, number of steps and callbacks on every rank."
            )
        return [one for _, one in everyone]

    def _count(self) -> float | None:
        # Keras weighs the loss of a batch by the number of its samples. A metric named "loss" of a user's own may not.
        tracker = getattr(self.model, "_loss_tracker", None) if self.weighted else None
        return None if tracker is None else float(keras.ops.convert_to_numpy(tracker.count))


def _callbacks_of_fit() -> list[Any] | None:
    """Return the callbacks of the `fit()` that calls a callback; None outside of one.

    Keras does not pass them to a callback, but the list that calls it is on the stack.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), keras.callbacks.CallbackList):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"].callbacks


def _decides(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback decides by the logs at the end of an epoch."""
    if isinstance(callback, keras.callbacks.ModelCheckpoint):
        return bool(callback.save_best_only)
    return hasattr(callback, "monitor")


class _Agreement(keras.callbacks.Callback):
    """What a `MetricAverageCallback` adds after all other callbacks: there ranks agree on what the others have done."""

    def __init__(self, average: MetricAverageCallback) -> None:
        super().__init__()
        self.average = average
        self._every_batch = False
        self._epoch = 0
        self._warned = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Find out whether any rank may stop in the middle of an epoch."""
        may_stop = any(isinstance(other, keras.callbacks.TerminateOnNaN) for other in self.average._callbacks)
        self._every_batch = any(self.average.meet("the start of fit()", may_stop))

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Refuse ranks in different epochs, and one that goes on where others have ended."""
        self._epoch = epoch
        self.average.meet(f"the start of epoch {epoch}")

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Stop where one rank does."""
        if self._every_batch:
            self._agree_to_stop(f"batch {batch} of epoch {self._epoch}")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Stop where one rank does, and compare the ranks."""
        self._agree_to_stop(f"the end of epoch {epoch}")
        self._compare()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Compare the ranks once more: other callbacks may have restored weights."""
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
    """Sets the learning rate to `initial_lr * multiplier` from the epoch `start_epoch` on, up to `end_epoch`.

    `multiplier` is a function of the epoch, or a number `m` for the exponential decay `m ** (epoch - start_epoch)`; a rate
    that stays at a tenth is `lambda epoch: 0.1`. With `staircase`, the rate is set when an epoch begins, and `epoch` is an
    integer; without, before every batch, and `epoch = full_epochs + batch / steps_per_epoch`. At the end of every epoch the
    rate is logged as `"lr"`. (Where `steps_per_execution` puts batches together, it is set once for them.)

    Momentum correction: SGD and RMSprop keep in their velocities learning rates of the past. Where the rate changes, the
    velocities are scaled by `new_rate / old_rate`, which is what a larger momentum for one step would do
    ([Goyal et al., 2017](https://arxiv.org/abs/1706.02677), remark 3). Horovod sets the momentum itself, which in Keras 3 is
    a constant of the compiled step; the results differ by a rounding, and with `nesterov=True`, where Horovod corrects
    twice and this once.

    Args:
        initial_lr: The learning rate that is multiplied, usually that for all ranks together.
        multiplier: A number, or a function of the epoch that returns one.
        start_epoch: The first epoch that is adjusted.
        end_epoch: The epoch before which adjusting ends. Defaults to `None`, never.
        staircase: Whether to adjust per epoch and not per batch.
        momentum_correction: Whether to correct the momentum of an optimizer that has one.
        steps_per_epoch: The number of batches per epoch. Defaults to what `fit()` knows.
        optimizer: The optimizer to set. Defaults to `model.optimizer`; required where a model with a `train_step()` of its own
            holds several.

    Raises:
        ValueError: When training starts, if the model has several optimizers and none was chosen.
        TypeError: When training starts, if the optimizer's learning rate is not a number that can be set: a
            `LearningRateSchedule` or a function, or the optimizer is a `MultiOptimizer`, which has several.
        ValueError: If `initial_lr` is `None`; when training starts, if the number of steps is needed and not known.

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
        """Look at the optimizers and at the number of steps."""
        held = optimizers_of(self.model)
        if self.optimizer is None and len(held) > 1 and type(self.model).train_step is not keras.Model.train_step:
            raise ValueError(
                f"model {self.model.name!r} holds several optimizers, and its own `train_step()` may apply any of them. Say "
                f"which to set: {type(self).__name__}(..., optimizer=optimizer), one callback for each. "
                f"Received: optimizer=None, with {[one.name for one in held]}"
            )
        self._optimizer()
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ValueError(
                    "the number of steps per epoch is not known: the data does not tell its length. Pass `steps_per_epoch` to "
                    f"`fit()` or to {type(self).__name__}(). Received: steps_per_epoch={self.steps_per_epoch}"
                )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Take note of the epoch."""
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Set the learning rate, before the first batch or before every batch."""
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
        """The optimizer that holds the learning rate."""
        optimizer = self.model.optimizer if self.optimizer is None else self.optimizer
        while hasattr(optimizer, "inner_optimizer"):
            optimizer = optimizer.inner_optimizer
        rate = "several" if hasattr(optimizer, "optimizers") else getattr(optimizer, "_learning_rate", None)
        if not isinstance(rate, keras.Variable):
            raise TypeError(
                f"{type(self).__name__} sets the learning rate and needs an optimizer that was made with one number for it "
                f"(or leave the schedule to the optimizer and the callback out). Received: {type(optimizer).__name__} with "
                f"learning_rate={rate}"
            )
        return optimizer

    def _learning_rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self._optimizer().learning_rate))

    def _adjust(self, epoch: float) -> None:
        optimizer = self._optimizer()
        old = self._learning_rate()
        optimizer.learning_rate = self.initial_lr * self.multiplier(epoch)
        new = self._learning_rate()
        if self.momentum_correction and old and new != old:  # no velocity comes from a rate of zero
            for velocity in _velocities(optimizer):
                velocity.assign(velocity * (new / old))


def _velocities(optimizer: keras.optimizers.Optimizer) -> Sequence[keras.Variable]:
    """The variables of an optimizer that are sums of gradients times learning rates."""
    if isinstance(optimizer, keras.optimizers.SGD):
        return getattr(optimizer, "momentums", ())
    if isinstance(optimizer, keras.optimizers.RMSprop):
        return getattr(optimizer, "_momentums", ())
    return ()


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate in even steps from `initial_lr / hvd.size()` to `initial_lr`.

    With `epoch = full_epochs + (batch + 1) / steps_per_epoch` it is
    `initial_lr / size * (epoch * (size - 1) / warmup_epochs + 1)`, so the last batch of the last warmup epoch has `initial_lr`.
    See [Goyal et al., 2017](https://arxiv.org/abs/1706.02677) and `LearningRateScheduleCallback` for the rest.

    Args:
        initial_lr: The learning rate for all ranks together, which warming up ends with.
        warmup_epochs: The number of epochs that warming up takes.
        momentum_correction: Whether to correct the momentum of an optimizer that has one.
        steps_per_epoch: The number of batches per epoch. Defaults to what `fit()` knows.
        optimizer: See `LearningRateScheduleCallback`.
        verbose: 1 to have rank 0 print a line when warming up is done.

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
            # An elastic job has another size tomorrow.
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
        """Log the learning rate, and say when warming up is done."""
        super().on_epoch_end(epoch, logs)
        if self.verbose > 0 and epoch == self.end_epoch - 1 and ranks.require().rank() == 0:
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {self._learning_rate():g}.")


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """`keras.callbacks.ModelCheckpoint` that keeps the best model and writes it on one rank.

    Give it to all ranks or to that one: two that write one file would spoil it. After `MetricAverageCallback` the best is
    that of all ranks.

    Args:
        monitor: The name in the logs to go by.
        verbose: Verbosity mode, 0 or 1.
        save_weights_only: Whether to save the weights alone.
        mode: One of `"auto"`, `"min"`, `"max"`.
        save_freq: `"epoch"`, or a number of batches.
        filepath: Where to save, which may hold names of the logs: `"best.keras"`, or `"best.weights.h5"` for the weights.
            Horovod has no such argument and leaves the attribute `filepath` to be set before training; so may you.
        root_rank: The rank that writes.

    Raises:
        ValueError: When training starts, if there is no `filepath`; if it has not the ending that Keras wants.

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
        # Keras looks at the ending here.
        ending = "later.weights.h5" if save_weights_only else "later.keras"
        super().__init__(ending if filepath is None else filepath, monitor, verbose, True, save_weights_only, mode, save_freq)
        if filepath is None:
            self.filepath: Any = None
        self.root_rank = root_rank

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Refuse to find out at the end of an epoch that there is nowhere to save."""
        super().on_train_begin(logs)
        if self.filepath is None:
            raise ValueError("BestModelCheckpoint needs to know where to save: pass `filepath`. Received: filepath=None")
        self.filepath = str(self.filepath)
        ranks.check_before_training(self.model)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save, on one rank, where `save_freq` is a number."""
        if ranks.require().rank() == self.root_rank:
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Save, on one rank."""
        if ranks.require().rank() == self.root_rank:
            super().on_epoch_end(epoch, logs)
