"""Keras 3 under Horovod: an optimizer that averages gradients.

* A distributed optimizer is the user's own object with one method more: its state, its config, its name in a file and
  `isinstance` stay those of the wrapped class. So what is saved knows nothing of Horovod, and what is loaded (built,
  with its state) can be wrapped again.
* `Optimizer.apply` is the only hook: gradients are averaged before anything else sees them, hence clipping, weight
  decay, EMA and the decision of a LossScaleOptimizer come out alike on every rank.
* Collectives have names of their own, never those of Keras, which count the objects of a process and so may differ
  between ranks.

Custom training loops need none of this: `apply_gradients` of a distributed optimizer averages there, too, or take
`hvd.DistributedGradientTape`. That asks its sources for `.ref()`, which only the backing `tf.Variable`s have:

```python
with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
    loss = loss_fn(y, model(x, training=True))
gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
optimizer.apply_gradients(zip(gradients, model.trainable_variables))
```
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import keras

from hvd_syncbn import horovod
from hvd_syncbn.tf_impl.keras import ranks

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet

    Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices | None

_instances = itertools.count()


class _Averager:
    """Averages lists of gradients over the ranks of a process set."""

    def __init__(self, name: str, process_set: ProcessSet | None, compression: Any, sparse_as_dense: bool) -> None:
        hvd = ranks.require()
        self.name = name
        self.process_set = process_set or hvd.global_process_set
        self.compression = compression or hvd.Compression.none
        self.sparse_as_dense = sparse_as_dense
        self.is_alone()  # raises if this rank has no business in the process set

    def is_alone(self) -> bool:
        """Tell whether there is nobody to talk to. An elastic job may grow after a step was traced: never alone."""
        alone = horovod.size(ranks.require(), self.process_set) == 1
        return alone and not int(os.environ.get("HOROVOD_ELASTIC", "0"))

    def _options(self, what: str) -> dict[str, Any]:
        """Return what every collective is called with."""
        from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

        if GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise RuntimeError(
                "XLA cannot compile Horovod's collectives: pass `jit_compile=False` to `compile()` or `tf.function`. "
                "Received: jit_compile=True"
            )
        return {"name": f"{self.name}.{what}", "ignore_name_scope": True, "process_set": self.process_set}

    def all_ranks(self, condition: tf.Tensor) -> tf.Tensor:
        """Return whether a condition holds on every rank."""
        if self.is_alone():
            return condition
        hvd = ranks.require()
        return hvd.allreduce(tf.cast(condition, tf.float32), op=hvd.Min, **self._options("finite")) > 0

    def average(self, gradients: Sequence[Gradient]) -> list[Gradient]:
        """Return the average over the ranks of each gradient; where there is none, there is none on any rank."""
        averaged = list(gradients)
        if self.is_alone():
            return averaged
        groups: dict[tuple[Any, ...], list[int]] = {}  # Horovod wants one dtype in a group
        for i, gradient in enumerate(averaged):
            if gradient is None:
                continue
            if self.sparse_as_dense:
                averaged[i] = gradient = tf.convert_to_tensor(gradient)
            index_dtype = gradient.indices.dtype if isinstance(gradient, tf.IndexedSlices) else None
            groups.setdefault((gradient.dtype, index_dtype), []).append(i)
        for n, ((dtype, index_dtype), positions) in enumerate(groups.items()):
            # Horovod's TensorFlow part does not know bfloat16.
            group = [tf.cast(averaged[i], tf.float32 if dtype == tf.bfloat16 else dtype) for i in positions]
            reduced = self._average_sparse(group, n) if index_dtype else self._average_dense(group, n)
            for i, gradient in zip(positions, reduced, strict=True):
                averaged[i] = tf.cast(gradient, dtype)
        return averaged

    def _average_dense(self, group: list[tf.Tensor], n: int) -> list[tf.Tensor]:
        hvd, options = ranks.require(), self._options(f"gradients.{n}")
        averaged: list[tf.Tensor] = hvd.grouped_allreduce(group, op=hvd.Average, compression=self.compression, **options)
        return averaged

    def _average_sparse(self, group: list[tf.IndexedSlices], n: int) -> list[tf.IndexedSlices]:
        # Not left to grouped_allreduce: that gives slices the dense shapes of other gradients, and no names.
        hvd = ranks.require()
        values = hvd.grouped_allgather([g.values for g in group], **self._options(f"values.{n}"))
        indices = hvd.grouped_allgather([g.indices for g in group], **self._options(f"indices.{n}"))
        size = hvd.size_op(self.process_set.process_set_id)
        return [
            tf.IndexedSlices(v / tf.cast(size, v.dtype), i, g.dense_shape)
            for v, i, g in zip(values, indices, group, strict=True)
        ]


class _Distributed(keras.optimizers.Optimizer):
    """What a distributed optimizer does differently; comes before the wrapped class."""

    # Of the class that DistributedOptimizer makes for one optimizer: on the instance, Keras would track and save them.
    _averager: _Averager
    _passes: int
    _accumulators: list[tf.Variable]

    def apply(self, grads: Sequence[Gradient], trainable_variables: Sequence[Any] | None = None) -> None:
        """Average the gradients, then do as the wrapped optimizer does."""
        if self._passes > 1:
            self._accumulate(list(grads), trainable_variables)
        else:
            super().apply(self._averager.average(grads), trainable_variables)

    def _accumulate(self, grads: list[Gradient], trainable_variables: Sequence[Any] | None) -> None:
        if trainable_variables is not None and not self.built:  # creates variables, impossible in a branch
            self.build(list(trainable_variables))
        present = {i: tf.convert_to_tensor(g) / self._passes for i, g in enumerate(grads) if g is not None}
        if not self._accumulators:
            with tf.init_scope():
                zeros = [tf.zeros(g.shape, g.dtype) for g in present.values()]
                self._accumulators.extend(tf.Variable(z, trainable=False) for z in [*zeros, tf.constant(0)])
        *means, count = self._accumulators
        for mean, gradient in zip(means, present.values(), strict=True):
            mean.assign_add(gradient)
        count.assign_add(1)
        apply = super().apply

        def update() -> None:
            local = dict(zip(present, means, strict=True))
            gradients = [local[i].read_value() if i in local else None for i in range(len(grads))]
            apply(self._averager.average(gradients), trainable_variables)
            for variable in self._accumulators:
                variable.assign(tf.zeros_like(variable))

        tf.cond(count == self._passes, update, lambda: None)


def _on_all_ranks(check_finite: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    @functools.wraps(check_finite)
    def agreed(self: keras.optimizers.LossScaleOptimizer, grads: Sequence[Gradient]) -> tf.Tensor:
        finite, inner = check_finite(self, grads), self.inner_optimizer
        return inner._averager.all_ranks(finite) if isinstance(inner, _Distributed) else finite

    return agreed


# Under mixed_float16 `compile()` puts a LossScaleOptimizer around ours, and that looks at gradients not averaged yet:
# a rank that skips the step alone would leave the others waiting. Nothing but this method can know better.
keras.optimizers.LossScaleOptimizer.check_finite = _on_all_ranks(keras.optimizers.LossScaleOptimizer.check_finite)


def DistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    *,
    process_set: ProcessSet | None = None,
    backward_passes_per_step: int = 1,
    compression: Any = None,
    sparse_as_dense: bool = False,
    op: Any = None,
    average_aggregated_gradients: bool = True,
) -> keras.optimizers.Optimizer:
    """Make a Keras 3 optimizer average its gradients over all ranks.

    The optimizer itself is changed and returned, so that one loaded with a model keeps its state. Wrap before the
    model is trained, and create and wrap the same optimizers in the same order on all ranks. A model saved with it
    holds the plain optimizer and loads where there is no Horovod; to continue, wrap `model.optimizer` again.

    Under float16, `DistributedOptimizer(LossScaleOptimizer(...))` is faster than the other way round, which is what
    `compile()` makes of it by itself: outside, a LossScaleOptimizer costs one more (small) collective per step.

    Args:
        optimizer: Any `keras.optimizers.Optimizer`, built or not.
        name: The prefix of the names of the collectives, the same on all ranks. Defaults to a counted one.
        process_set: The `hvd.ProcessSet` to average over. Defaults to all ranks.
        backward_passes_per_step: The number of batches whose gradients are averaged locally before one exchange and
            one update. Everything that counts steps (schedules, EMA) counts updates, as with a larger batch; the
            optimizer must always be applied to the same variables. Sparse gradients become dense.
        compression: One of `hvd.Compression`, for dense gradients. Defaults to none.
        sparse_as_dense: Whether to add up `tf.IndexedSlices` into dense gradients instead of gathering the slices of
            all ranks; faster where most rows are touched.
        op: `hvd.Average`, which is what this does; for scripts that say so.
        average_aggregated_gradients: `True`, likewise: the gradients of `backward_passes_per_step` batches are averaged.

    Raises:
        TypeError: If `optimizer` is not a Keras 3 optimizer.
        ValueError: If it is distributed already, or `backward_passes_per_step` is less than 1.
        RuntimeError: If Horovod is missing or not initialized, or Keras does not run on TensorFlow.

    Example:

    ```python
    hvd.init()
    model.compile(optimizer=DistributedOptimizer(keras.optimizers.SGD(0.01 * hvd.size())), loss="mse")
    model.fit(x, y, callbacks=[BroadcastVariablesCallback(), MetricAverageCallback()])
    ```
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"`optimizer` must be a `keras.optimizers.Optimizer` of Keras 3. Received: {optimizer!r} "
            f"(of type {type(optimizer)})"
        )
    if isinstance(optimizer, _Distributed) or isinstance(getattr(optimizer, "inner_optimizer", None), _Distributed):
        raise ValueError(f"`optimizer` is a DistributedOptimizer already. Received: {optimizer!r}")
    if not isinstance(backward_passes_per_step, int) or backward_passes_per_step < 1:
        raise ValueError(
            f"`backward_passes_per_step` must be an integer >= 1. Received: backward_passes_per_step={backward_passes_per_step}"
        )
    _check_averaging(op, average_aggregated_gradients, backward_passes_per_step)
    name = name or f"hvd_syncbn.DistributedOptimizer{next(_instances)}"
    wrapped = type(optimizer)
    members = {
        "_averager": _Averager(name, process_set, compression, sparse_as_dense),
        "_passes": backward_passes_per_step,
        "_accumulators": [],
        # Keras writes the class it finds here into a file: still the wrapped one.
        "__class__": property(lambda self: wrapped),
    }
    # Past Keras's own __setattr__, which would take the class for a state to track.
    object.__setattr__(optimizer, "__class__", type(wrapped.__name__, (_Distributed, wrapped), members))
    return optimizer


def _check_averaging(op: Any, average_aggregated_gradients: bool, passes: int) -> None:
    """Refuse the sums that Horovod's optimizer can do: with them a script would train with other learning rates."""
    if op is not None and op != ranks.require().Average:
        raise ValueError(f"gradients are averaged: multiply the learning rate instead. Received: op={op}")
    if passes > 1 and not average_aggregated_gradients:
        raise ValueError(
            "the gradients of several batches are averaged: multiply the learning rate by `backward_passes_per_step` instead. "
            f"Received: average_aggregated_gradients=False, backward_passes_per_step={passes}"
        )
