"""Keras 3 under Horovod: an optimizer that averages gradients.

* A distributed optimizer is the user's object. Its class is changed to a subclass, so `isinstance` and its state are kept.
* Copies are distributed, too, each with its own accumulators: by `from_config`, `copy.deepcopy`, pickle and `clone_model`, of
  a whole model, and inside a LossScaleOptimizer. A file, however, contains the wrapped class and loads without Horovod.
  `load_model` wraps the loaded optimizer (built, with its state) again.
* `Optimizer.apply` is the only hook. Gradients are averaged before they are used, so clipping, weight decay, EMA and the
  decision of a LossScaleOptimizer to skip a step are the same on every rank.
* Names of collectives do not contain Keras's object names: these are numbered per process and may differ between ranks.
  Optimizers are numbered when they first exchange gradients, which ranks do in the same order.

In a custom training loop, `apply_gradients` of a distributed optimizer averages as well. Alternatively, use a plain optimizer
with `DistributedGradientTape` of this package. (Horovod's tape needs the `tf.Variable` of each Keras variable, `v.value`.)

```python
with DistributedGradientTape(tf.GradientTape()) as tape:
    loss = loss_fn(y, model(x, training=True))
gradients = tape.gradient(loss, model.trainable_variables)
optimizer.apply_gradients(zip(gradients, model.trainable_variables))
```
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
from keras.src.backend.common import global_state
from keras.src.saving.keras_saveable import KerasSaveable

from hvd_syncbn import horovod
from hvd_syncbn.tf_impl.keras import ranks
from hvd_syncbn.tf_impl.keras.convert import _walk, change_class

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet

    Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices | None

NAME = "hvd_syncbn.DistributedOptimizer"
_named: Counter[tuple[int, str]] = Counter()


class _Averager:
    """The averaging of one optimizer: its settings, and its state between steps.

    Horovod is only used when there is something to average, so that copies can be created without it. A process set may be the
    list of its ranks.
    """

    op: Any = None
    """Horovod's reduction of gradients; None for the average."""
    applied = False
    """Whether the optimizer was applied since it became distributed, in a step that ran or was traced."""

    def __init__(
        self,
        name: str = NAME,
        process_set: ProcessSet | Sequence[int] | None = None,
        backward_passes_per_step: int = 1,
        compression: Any = None,
        sparse_as_dense: bool = False,
        gradient_predivide_factor: float = 1.0,
        scale_local_gradients: bool = True,
    ) -> None:
        self.name = name
        self.given_process_set = process_set
        self.passes = backward_passes_per_step
        self.given_compression = compression
        self.sparse_as_dense = sparse_as_dense
        self.predivide = gradient_predivide_factor
        self.scale_local_gradients = scale_local_gradients
        self.local_variables: dict[int, Any] = {}  # by id; the reference keeps the id valid
        self.accumulators: list[tf.Variable] = []

    def get_config(self) -> dict[str, Any]:
        """Return the settings in a form that a config can contain."""
        if self.local_variables:
            raise ValueError(
                "an optimizer with local variables cannot be copied, because the copy cannot know which variables of its model "
                "are local. Copy the plain optimizer, and pass the copy to PartialDistributedOptimizer. "
                f"Received: local variables {[v.name for v in self.local_variables.values()]}"
            )
        compression: Any = self.given_compression
        if compression is not None and not isinstance(compression, str):
            compressions = {value: key for key, value in vars(ranks.require().Compression).items() if isinstance(value, type)}
            if compression not in compressions:
                raise ValueError(f"a config can only contain a member of `hvd.Compression`. Received: {compression!r}")
            compression = compressions[compression]
        return {
            "name": self.name,
            "process_set": horovod.ranks_of(self.given_process_set),
            "backward_passes_per_step": self.passes,
            "compression": compression,
            "sparse_as_dense": self.sparse_as_dense,
            "gradient_predivide_factor": self.predivide,
            "scale_local_gradients": self.scale_local_gradients,
        }

    def register_local(self, variables: Iterable[Any]) -> None:
        """Exclude the gradients of variables from averaging."""
        self.local_variables |= {id(variable): variable for variable in map(backing, variables)}

    def places(self, variables: Sequence[Any]) -> set[int]:
        """Return the indices of the local variables in a list of variables."""
        return {i for i, variable in enumerate(variables) if id(backing(variable)) in self.local_variables}

    @functools.cached_property
    def process_set(self) -> ProcessSet:
        """The process set that is registered with Horovod."""
        hvd, given = ranks.require(), self.given_process_set
        if given is None:
            return hvd.global_process_set
        return given if hasattr(given, "ranks") else horovod.registered_process_set(hvd, given, "an optimizer")

    @functools.cached_property
    def compression(self) -> Any:
        """The member of `hvd.Compression`."""
        given = self.given_compression or "none"
        return getattr(ranks.require().Compression, given) if isinstance(given, str) else given

    @functools.cached_property
    def prefix(self) -> str:
        """The prefix of the collectives' names: unique to this optimizer, and the same on all ranks."""
        key = (horovod.process_set_id(self.process_set), self.name)
        number, _named[key] = _named[key], _named[key] + 1
        return f"{self.name}.{number}" if number else self.name

    def is_alone(self) -> bool:
        """Return whether this is the only rank. False in an elastic job, which may grow after a step was traced."""
        alone = horovod.size(ranks.require(), self.process_set) == 1
        return alone and not int(os.environ.get("HOROVOD_ELASTIC", "0"))

    def _options(self, what: str) -> dict[str, Any]:
        """Return the common arguments of all collectives."""
        from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

        if GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise RuntimeError(
                "XLA cannot compile Horovod's collectives: pass `jit_compile=False` to `compile()` or `tf.function`. "
                "Received: jit_compile=True"
            )
        return {"name": f"{self.prefix}.{what}", "ignore_name_scope": True, "process_set": self.process_set}

    def all_ranks(self, condition: tf.Tensor) -> tf.Tensor:
        """Return whether a condition holds on every rank."""
        if self.is_alone():
            return condition
        hvd = ranks.require()
        return hvd.allreduce(tf.cast(condition, tf.float32), op=hvd.Min, **self._options("finite")) > 0

    def average(self, gradients: Sequence[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        """Return the average of each gradient over the ranks. A gradient that is None must be None on all ranks.

        The gradients of local variables are not averaged, but divided by the number of ranks, as if the other ranks had sent
        zeros. For gradients that overwrite their variable, return the maximum over the ranks, or the unchanged gradient if the
        variable is local.
        """
        averaged = list(gradients)
        if self.is_alone():
            return averaged
        local = self.places(variables)
        groups: dict[tuple[Any, ...], list[int]] = {}  # Horovod requires one dtype per group
        maxima = []
        for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
            if gradient is None or (i in local and overwrites(variable)):
                continue
            if i in local:
                averaged[i] = self._divided_by_size(gradient) if self.scale_local_gradients else gradient
                continue
            if overwrites(variable):
                maxima.append(i)
                continue
            if self.sparse_as_dense:
                averaged[i] = gradient = tf.convert_to_tensor(gradient)
            index_dtype = gradient.indices.dtype if isinstance(gradient, tf.IndexedSlices) else None
            groups.setdefault((gradient.dtype, index_dtype), []).append(i)
        self._maximize(averaged, maxima)
        for n, ((dtype, index_dtype), positions) in enumerate(groups.items()):
            # Horovod does not support bfloat16 in TensorFlow.
            group = [tf.cast(averaged[i], tf.float32 if dtype == tf.bfloat16 else dtype) for i in positions]
            reduced = self._average_sparse(group, n) if index_dtype else self._average_dense(group, n)
            for i, gradient in zip(positions, reduced, strict=True):
                averaged[i] = tf.cast(gradient, dtype)
        return averaged

    def _maximize(self, gradients: list[Any], positions: list[int]) -> None:
        """Replace the gradients at the positions by their maximum over the ranks."""
        for dtype in dict.fromkeys(gradients[i].dtype for i in positions):
            chosen = [i for i in positions if gradients[i].dtype == dtype]
            group = [tf.cast(gradients[i], tf.float32 if dtype == tf.bfloat16 else dtype) for i in chosen]
            options = self._options(f"maxima.{dtype.name}")
            maxima = ranks.require().grouped_allreduce(group, op=ranks.require().Max, **options)
            for i, maximum in zip(chosen, maxima, strict=True):
                gradients[i] = tf.cast(maximum, dtype)

    def _average_dense(self, group: list[tf.Tensor], n: int) -> list[tf.Tensor]:
        hvd = ranks.require()
        scale = {"prescale_factor": 1.0 / self.predivide, "postscale_factor": self.predivide}
        options = {"op": self.op or hvd.Average, "compression": self.compression} | self._options(f"gradients.{n}") | scale
        averaged: list[tf.Tensor] = hvd.grouped_allreduce(group, **options)
        return averaged

    def _average_sparse(self, group: list[tf.IndexedSlices], n: int) -> list[tf.IndexedSlices]:
        # `grouped_allreduce` would give slices the dense shapes of other gradients, and no names.
        hvd = ranks.require()
        values = hvd.grouped_allgather([g.values for g in group], **self._options(f"values.{n}"))
        indices = hvd.grouped_allgather([g.indices for g in group], **self._options(f"indices.{n}"))
        gathered = [tf.IndexedSlices(v, i, g.dense_shape) for v, i, g in zip(values, indices, group, strict=True)]
        return gathered if self.op == hvd.Sum else [self._divided_by_size(slices) for slices in gathered]

    def _divided_by_size(self, gradient: Any) -> Any:
        if isinstance(gradient, tf.IndexedSlices):
            return tf.IndexedSlices(self._divided_by_size(gradient.values), gradient.indices, gradient.dense_shape)
        return gradient / tf.cast(ranks.require().size_op(self.process_set.process_set_id), gradient.dtype)


@keras.saving.register_keras_serializable("hvd_syncbn", "DistributedOptimizer")
class _Distributed(keras.optimizers.Optimizer):
    """Mixin of a distributed optimizer; precedes the wrapped class in the bases.

    It is registered for pickles, which use this name for all distributed optimizers: the unpickling process may not have
    created the subclass yet.
    """

    _wrapped: type[keras.optimizers.Optimizer]
    _averager: _Averager

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "_averager", _Averager())
        super().__init__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "loss_scale_factor":
            # A LossScaleOptimizer only sets this attribute of the optimizer that it wraps. There is no other hook.
            _agree(sys._getframe(1).f_locals.get("self"), self)

    def get_config(self) -> dict[str, Any]:
        """Return the wrapped optimizer's config and, except for a file, the settings of averaging."""
        config: dict[str, Any] = super().get_config()
        return config if _writing_a_file() else config | {"distributed": self._averager.get_config()} | _name_of(self)

    @classmethod
    def from_config(cls, config: dict[str, Any], **kwargs: Any) -> _Distributed:
        """Create a distributed optimizer with separate accumulators."""
        config = dict(config)
        if "wrapped" in config:
            named: _Distributed = _named_class(config.pop("wrapped")).from_config(config, **kwargs)
            return named
        averager = _Averager(**config.pop("distributed", {}))
        optimizer: _Distributed = super().from_config(config, **kwargs)
        object.__setattr__(optimizer, "_averager", averager)
        return optimizer

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as Keras does."""
        return _unpickle, super().__reduce__()[1]

    def register_local_var(self, var: Any) -> None:
        """Exclude the gradient of a Keras or TensorFlow variable from averaging. See `PartialDistributedOptimizer`."""
        if not hasattr(var, "assign"):
            raise ValueError(f"a local variable must be a Keras or TensorFlow variable. Received: {var!r}")
        self._averager.register_local([var])

    def check_finite(self, grads: Sequence[Gradient]) -> tf.Tensor:
        """Return whether the gradients of a LossScaleOptimizer are finite; on every rank, if there are local variables."""
        finite = super().check_finite(grads)
        return self._averager.all_ranks(finite) if self._averager.local_variables else finite

    def apply(self, grads: Sequence[Gradient], trainable_variables: Sequence[Any] | None = None) -> None:
        """Average the gradients, then apply them with the wrapped optimizer."""
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, keras.optimizers.LossScaleOptimizer) and not isinstance(caller, _Distributed | _Agreeing):
            raise RuntimeError(
                "an optimizer inside a LossScaleOptimizer was made distributed: ranks would not agree on which steps to skip. "
                f"Use `DistributedOptimizer(loss_scale_optimizer)`. Received: {caller!r}"
            )
        averager = self._averager
        averager.applied = True
        _check_model_in_training(averager.process_set)
        if averager.passes > 1:
            self._accumulate(list(grads), trainable_variables)
        else:
            super().apply(averager.average(grads, self._variables_of(trainable_variables)), trainable_variables)

    def _variables_of(self, trainable_variables: Sequence[Any] | None) -> Sequence[Any]:
        """Return the variables of the gradients."""
        if self._averager.local_variables and getattr(getattr(self, "inner_optimizer", self), "global_clipnorm", None):
            raise ValueError(
                "`global_clipnorm` needs the same gradients on every rank: with local variables, ranks would scale the "
                f"averaged gradients differently. Use `clipnorm` or `clipvalue`. Received: {self!r} with local variables"
            )
        return self._trainable_variables if trainable_variables is None else trainable_variables

    def _accumulate(self, grads: list[Gradient], trainable_variables: Sequence[Any] | None) -> None:
        if trainable_variables is not None and not self.built:  # `build` cannot create variables inside tf.cond
            self.build(list(trainable_variables))
        averager = self._averager
        variables = self._variables_of(trainable_variables)
        overwriting = {i for i, variable in enumerate(variables) if overwrites(variable)}
        present = {i: tf.convert_to_tensor(g) for i, g in enumerate(grads) if g is not None}
        if not averager.accumulators:
            with tf.init_scope():
                zeros = [tf.zeros(g.shape, g.dtype) for g in present.values()]
                averager.accumulators.extend(tf.Variable(z, trainable=False) for z in [*zeros, tf.constant(0)])
        *means, count = averager.accumulators
        for mean, (i, gradient) in zip(means, present.items(), strict=True):
            if i in overwriting:  # like Keras's gradient accumulation
                mean.assign(tf.maximum(mean, gradient))
            else:
                mean.assign_add(gradient / averager.passes)
        count.assign_add(1)
        apply = super().apply

        def update() -> None:
            local = dict(zip(present, means, strict=True))
            gradients = [local[i].read_value() if i in local else None for i in range(len(grads))]
            apply(averager.average(gradients, variables), trainable_variables)
            for variable in averager.accumulators:
                variable.assign(tf.zeros_like(variable))

        tf.cond(count == averager.passes, update, lambda: None)


class _Agreeing(keras.optimizers.LossScaleOptimizer):
    """Mixin of a LossScaleOptimizer that wraps a distributed optimizer; precedes the wrapped class in the bases.

    Under mixed_float16, `compile()` wraps the distributed optimizer in a LossScaleOptimizer, which checks gradients before they
    are averaged. If one rank alone skipped a step, the other ranks would wait forever.
    """

    _wrapped: type[keras.optimizers.Optimizer]

    def check_finite(self, grads: Sequence[Gradient]) -> tf.Tensor:
        """Return whether the gradients are finite on every rank."""
        return self.inner_optimizer._averager.all_ranks(super().check_finite(grads))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as Keras does."""
        return _unpickle, super().__reduce__()[1]


def _agree(outer: Any, inner: _Distributed) -> None:
    plain = isinstance(outer, keras.optimizers.LossScaleOptimizer) and not isinstance(outer, _Distributed | _Agreeing)
    if plain and getattr(outer, "inner_optimizer", None) is inner:
        cls: Any = type(outer)
        change_class(outer, _subclass(_Agreeing, cls))


@functools.cache
def _subclass(mixin: Any, wrapped: Any) -> type:
    """Create a subclass of a mixin and a wrapped class. It is registered with Keras; files contain the wrapped class."""

    def seen(self: Any) -> type:
        if mixin is _Agreeing or _writing_a_file():
            return wrapped
        return _Distributed if _pickling() else type(self)

    members = {"__module__": __name__, "_wrapped": wrapped, "__class__": property(seen)}
    cls = type(wrapped.__name__, (mixin, wrapped), members)
    name = f"{mixin.__name__.strip('_')}({wrapped.__module__}.{wrapped.__qualname__})"
    registered: type = keras.saving.register_keras_serializable("hvd_syncbn", name)(cls)
    return registered


def _named_class(name: str) -> Any:
    """Return the distributed subclass for the registered name of a wrapped class."""
    wrapped: Any = keras.saving.get_registered_object(name) or getattr(keras.optimizers, name, None)
    if wrapped is None:
        raise ValueError(
            "the class of a distributed optimizer is not registered in this process: import it, decorated with "
            f"`@keras.saving.register_keras_serializable()`. Received: {name!r}"
        )
    return _subclass(_Distributed, wrapped)


def _name_of(optimizer: _Distributed) -> dict[str, Any]:
    return {"wrapped": keras.saving.get_registered_name(optimizer._wrapped)} if _pickling() else {}


def _unpickle(file: io.BytesIO) -> Any:
    """Unpickle an optimizer as Keras does. As a function of this module, it makes pickle import the module."""
    return keras.optimizers.Optimizer._unpickle_model(file)


def _writing_a_file() -> bool:
    """Return whether Keras is writing a config to a `.keras` or legacy `.h5` file. Keras has no public API for this."""
    get = global_state.get_global_attribute
    written = get("shared_objects/id_to_config_map") is not None or bool(get("use_legacy_config"))
    return written and not _pickling()


def _pickling() -> bool:
    """Return whether `copy.deepcopy` or pickle is running, on an optimizer or on a model that holds it."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not KerasSaveable.__reduce__.__code__:
        frame = frame.f_back
    return frame is not None


def _check_model_in_training(process_set: ProcessSet) -> None:
    """Run the training checks on the model whose training step called the optimizer."""
    if horovod.size(ranks.require(), process_set) == 1:
        return
    frame: Any = sys._getframe(2)  # Keras passes only the variables to an optimizer, not the model
    while frame is not None and not isinstance(frame.f_locals.get("self"), keras.Model):
        frame = frame.f_back
    if frame is not None:
        ranks.check_before_training(frame.f_locals["self"], process_set)


def _distribute(optimizer: Any, averager: _Averager) -> Any:
    cls: Any = type(optimizer)
    change_class(optimizer, _subclass(_Distributed, cls))
    object.__setattr__(optimizer, "_averager", averager)
    return optimizer


def backing(source: Any) -> Any:
    """Return the `tf.Variable` of a Keras variable; return anything else unchanged."""
    return source.value if isinstance(source, keras.Variable) else source


def overwrites(variable: Any) -> bool:
    """Return whether a variable's "gradient" is its new value, as for the scales and amax histories of float8 training."""
    return bool(getattr(variable, "overwrite_with_gradient", False))


def optimizers_of(model: keras.layers.Layer) -> list[keras.optimizers.Optimizer]:
    """Return the optimizers of a model and of the models in it: `model.optimizer` and those in other attributes.

    An optimizer inside another one (LossScaleOptimizer, MultiOptimizer) is not listed separately.
    """
    found = {id(one): one for _, layer in _walk(model, "", set()) for one in _own_optimizers(layer).values()}
    inner = {id(one) for outer in found.values() for one in members(outer)}
    return [optimizer for optimizer in found.values() if id(optimizer) not in inner]


def require_built(model: Any) -> None:
    """Build `model.optimizer`, and raise if another optimizer of the model is not built: its state cannot be saved."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
    outer = {id(one) for one in optimizers_of(model)}
    unbuilt = [name for name, one in _own_optimizers(model).items() if not one.built and id(one) in outer]
    if unbuilt:
        raise ValueError(
            "the model has optimizers that are not built, so their state cannot be saved. Build each with the variables that "
            f"it trains: `model.{unbuilt[0]}.build(variables)`. Received: model {model.name!r} with {unbuilt}, not built"
        )


def _own_optimizers(layer: keras.layers.Layer) -> dict[str, Any]:
    """Return the optimizers in a layer's attributes, lists and dictionaries, by name: "d_optimizer", "optimizers.0"."""
    held: dict[int, tuple[str, Any]] = {}
    # Public names first: Keras and TensorFlow also store some objects under private names.
    for name, value in sorted(vars(layer).items(), key=lambda item: item[0].startswith("_")):
        for place, optimizer in _held(name, value):
            held.setdefault(id(optimizer), (place, optimizer))
    return dict(held.values())


def _held(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, keras.optimizers.Optimizer):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _held(f"{name}.{key}", item)


def members(optimizer: Any) -> list[Any]:
    """Return the optimizers inside an optimizer, at any depth."""
    return [one for member in _direct_members(optimizer) for one in (member, *members(member))]


def _direct_members(optimizer: Any) -> list[Any]:
    """Return the optimizer in a LossScaleOptimizer or those in a MultiOptimizer."""
    inner = getattr(optimizer, "inner_optimizer", None)
    return list(getattr(optimizer, "optimizers", ())) if inner is None else [inner]


def is_distributed(optimizer: object) -> bool:
    """Return whether an optimizer averages over the ranks, or all optimizers directly inside it do."""
    if isinstance(optimizer, _Distributed):
        return True
    direct = _direct_members(optimizer)
    return bool(direct) and all(map(is_distributed, direct))


def is_new(optimizer: Any) -> bool:
    """Return whether an optimizer was not applied since it became distributed. Steps traced before that do not average."""
    every = [optimizer, *members(optimizer)]
    return any(isinstance(one, _Distributed) and not one._averager.applied for one in every)


def forget_gradients(optimizer: Any) -> None:
    """Discard accumulated gradients (`backward_passes_per_step`) that were not applied yet."""
    for one in (optimizer, *members(optimizer)):
        for accumulator in one._averager.accumulators if isinstance(one, _Distributed) else ():
            accumulator.assign(tf.zeros_like(accumulator))


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
    gradient_predivide_factor: float = 1.0,
    scale_local_gradients: bool = True,
    device_dense: str = "",
    device_sparse: str = "",
    num_groups: int = 0,
    groups: Any = None,
) -> keras.optimizers.Optimizer:
    """Make a Keras 3 optimizer average its gradients over all ranks.

    The optimizer is changed in place and returned, so an optimizer that was loaded with a model keeps its state. Wrap it before
    the model is trained, or continue training with `BroadcastVariablesCallback`, which makes Keras trace the step again. Copies
    of the optimizer or of its model are distributed, too: by `from_config`, `copy.deepcopy`, pickle and `clone_model`. A saved
    model contains the plain optimizer and loads without Horovod. To continue training, use `load_model`, or wrap
    `model.optimizer` again.

    Under float16, `DistributedOptimizer(LossScaleOptimizer(...))` is faster than the reverse nesting, which `compile()`
    creates by default: an outer LossScaleOptimizer costs one more (small) collective per step.

    Args:
        optimizer: Any `keras.optimizers.Optimizer`, built or not.
        name: The prefix of the collectives' names, the same on all ranks. If several optimizers share it (copies, or all by
            default), they are numbered in the order in which they first exchange gradients.
        process_set: The `hvd.ProcessSet` to average over. Defaults to all ranks.
        backward_passes_per_step: The number of batches whose gradients are averaged locally before one exchange and
            one update. Everything that counts steps (schedules, EMA) counts updates, as with a larger batch; the
            optimizer must always be applied to the same variables. Sparse gradients become dense.
        compression: A member of `hvd.Compression`, for dense gradients. Defaults to none.
        sparse_as_dense: Whether to convert `tf.IndexedSlices` to dense gradients instead of gathering the slices of all ranks;
            faster if most rows have gradients.
        op: Only `hvd.Average`; accepted for compatibility with Horovod.
        average_aggregated_gradients: Must be `True` with `backward_passes_per_step` greater than 1; accepted for compatibility
            with Horovod.
        gradient_predivide_factor: Dense gradients are divided by it before the sum, and multiplied by it after.
        scale_local_gradients: Whether the gradients of variables registered with the optimizer's `register_local_var()` are
            divided by the number of ranks.
        device_dense: Accepted for compatibility with Horovod; has no effect.
        device_sparse: Accepted for compatibility with Horovod; has no effect.
        num_groups: Accepted for compatibility with Horovod; has no effect. All gradients of one dtype are one group.
        groups: Accepted for compatibility with Horovod; has no effect.

    Raises:
        TypeError: If `optimizer` is not a Keras 3 optimizer.
        ValueError: If it or an optimizer in it is already distributed, or `backward_passes_per_step` is less than 1.
        RuntimeError: If Horovod is missing or not initialized, or Keras's backend is not TensorFlow.

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
    if any(map(is_distributed, (optimizer, *members(optimizer)))):
        raise ValueError(f"`optimizer` is already a DistributedOptimizer. Received: {optimizer!r}")
    if not isinstance(backward_passes_per_step, int) or backward_passes_per_step < 1:
        raise ValueError(
            f"`backward_passes_per_step` must be an integer >= 1. Received: backward_passes_per_step={backward_passes_per_step}"
        )
    _check_averaging(op, average_aggregated_gradients, backward_passes_per_step)
    averager = _Averager(
        name or NAME,
        process_set,
        backward_passes_per_step,
        compression,
        sparse_as_dense,
        gradient_predivide_factor,
        scale_local_gradients,
    )
    averager.is_alone()  # raises if Horovod is not initialized or this rank is not in the process set
    return _distribute(optimizer, averager)


def _check_averaging(op: Any, average_aggregated_gradients: bool, passes: int) -> None:
    """Reject Horovod's options for sums, which would change the effective learning rate."""
    if op is not None and op != ranks.require().Average:
        raise ValueError(f"gradients can only be averaged: multiply the learning rate instead. Received: op={op}")
    if passes > 1 and not average_aggregated_gradients:
        raise ValueError(
            "the gradients of several batches can only be averaged: multiply the learning rate by `backward_passes_per_step` "
            f"instead. Received: average_aggregated_gradients=False, backward_passes_per_step={passes}"
        )


def PartialDistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    *,
    local_layers: keras.layers.Layer | Iterable[keras.layers.Layer] | None = None,
    **options: Any,
) -> keras.optimizers.Optimizer:
    """Make an optimizer average its gradients over all ranks, except those of local layers, which each rank applies alone.

    Local gradients are divided by the number of ranks, as if the other ranks had zero gradients, unless
    `scale_local_gradients=False`. Use `BroadcastVariablesCallback(local_variables=...)` to exclude the local variables from the
    broadcast, too. The optimizer cannot be copied, because the copy cannot know the local layers. A file contains the plain
    optimizer, as with `DistributedOptimizer`.

    Args:
        optimizer: See `DistributedOptimizer`.
        name: See `DistributedOptimizer`.
        local_layers: One or several layers, built, whose variables are local to each rank.
        options: The other arguments of `DistributedOptimizer`.

    Raises:
        ValueError: If `local_layers` contains anything but built layers; or as in `DistributedOptimizer`. When the optimizer is
            applied: if it has a `global_clipnorm`, with which ranks would diverge.

    Example:

    ```python
    model.compile(PartialDistributedOptimizer(keras.optimizers.SGD(0.01), local_layers=model.layers[-1]), "mse")
    ```
    """
    variables = local_variables(local_layers)
    optimizer = DistributedOptimizer(optimizer, name, **options)
    optimizer._averager.register_local(variables)
    return optimizer


def local_variables(layers: Any) -> list[Any]:
    """Return the trainable variables of a `local_layers` argument."""
    layers = [layers] if isinstance(layers, keras.layers.Layer) else list(layers or ())
    for layer in layers:
        if not isinstance(layer, keras.layers.Layer) or not layer.built:
            raise ValueError(f"`local_layers` must be built Keras layers. Received: {layer!r}")
    return [variable for layer in layers for variable in layer.trainable_variables]
