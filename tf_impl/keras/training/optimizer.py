"""Keras 3 under Horovod: an optimizer that averages gradients.

* A distributed optimizer is the user's own object, of a class derived from its own: `isinstance`, state and all else stay.
* Its copies are distributed, too, each with its own accumulators: `from_config`, `copy.deepcopy`, pickle, `clone_model`, those
  of a whole model, and inside a LossScaleOptimizer. Only a file knows nothing of Horovod: it holds the wrapped class and loads
  anywhere. `load_model` wraps what is loaded (built, with its state) again.
* `Optimizer.apply` is the only hook: gradients are averaged before anything else sees them, hence clipping, weight
  decay, EMA and the decision of a LossScaleOptimizer come out alike on every rank.
* Collectives have names of their own, never those of Keras, which count the objects of a process and so may differ
  between ranks. Optimizers are counted when they first exchange something: in that the ranks agree already.

Custom training loops need none of this: `apply_gradients` of a distributed optimizer averages there, too, or take a plain one
with our `DistributedGradientTape`. (Horovod's own wants the `tf.Variable` behind each variable of Keras, `v.value`.)

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
    """How one optimizer averages: its settings, and what it keeps between steps.

    Horovod is asked for when there is something to average, so that a copy can be made anywhere. A process set may be the list
    of its ranks.
    """

    op: Any = None
    """What gradients become; None for their average."""
    applied = False
    """Whether an optimizer was applied since it is distributed, in a step that ran or was traced."""

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
        self.local_variables: dict[int, Any] = {}  # by id, so that one that is here stays what it is
        self.accumulators: list[tf.Variable] = []

    def get_config(self) -> dict[str, Any]:
        """The settings, as a config can hold them."""
        if self.local_variables:
            raise ValueError(
                "an optimizer that leaves variables to each rank cannot be copied: a copy would not know which of its model's "
                "these are. Copy the plain optimizer, and make it a PartialDistributedOptimizer. "
                f"Received: local variables {[v.name for v in self.local_variables.values()]}"
            )
        compression: Any = self.given_compression
        if compression is not None and not isinstance(compression, str):
            compressions = {value: key for key, value in vars(ranks.require().Compression).items() if isinstance(value, type)}
            if compression not in compressions:
                raise ValueError(f"a config can only hold a compression of `hvd.Compression`. Received: {compression!r}")
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
        """Leave the gradients of variables to each rank."""
        self.local_variables |= {id(variable): variable for variable in map(backing, variables)}

    def places(self, variables: Sequence[Any]) -> set[int]:
        """Where in a list of variables those are that are left to each rank."""
        return {i for i, variable in enumerate(variables) if id(backing(variable)) in self.local_variables}

    @functools.cached_property
    def process_set(self) -> ProcessSet:
        """The process set as Horovod knows it."""
        hvd, given = ranks.require(), self.given_process_set
        if given is None:
            return hvd.global_process_set
        return given if hasattr(given, "ranks") else horovod.registered_process_set(hvd, given, "an optimizer")

    @functools.cached_property
    def compression(self) -> Any:
        """One of `hvd.Compression`."""
        given = self.given_compression or "none"
        return getattr(ranks.require().Compression, given) if isinstance(given, str) else given

    @functools.cached_property
    def prefix(self) -> str:
        """What the names of the collectives begin with: of this optimizer alone, the same on all ranks."""
        key = (horovod.process_set_id(self.process_set), self.name)
        number, _named[key] = _named[key], _named[key] + 1
        return f"{self.name}.{number}" if number else self.name

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
        return {"name": f"{self.prefix}.{what}", "ignore_name_scope": True, "process_set": self.process_set}

    def all_ranks(self, condition: tf.Tensor) -> tf.Tensor:
        """Return whether a condition holds on every rank."""
        if self.is_alone():
            return condition
        hvd = ranks.require()
        return hvd.allreduce(tf.cast(condition, tf.float32), op=hvd.Min, **self._options("finite")) > 0

    def average(self, gradients: Sequence[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        """Return the average over the ranks of each gradient; where there is none, there is none on any rank.

        Gradients of local variables are this rank's own, divided by the number of ranks: as if the others had sent zeros.
        Those that overwrite their variable are the maximum over the ranks, or this rank's own if the variable is local.
        """
        averaged = list(gradients)
        if self.is_alone():
            return averaged
        local = self.places(variables)
        groups: dict[tuple[Any, ...], list[int]] = {}  # Horovod wants one dtype in a group
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
            # Horovod's TensorFlow part does not know bfloat16.
            group = [tf.cast(averaged[i], tf.float32 if dtype == tf.bfloat16 else dtype) for i in positions]
            reduced = self._average_sparse(group, n) if index_dtype else self._average_dense(group, n)
            for i, gradient in zip(positions, reduced, strict=True):
                averaged[i] = tf.cast(gradient, dtype)
        return averaged

    def _maximize(self, gradients: list[Any], positions: list[int]) -> None:
        """Replace the gradients at some positions by their maximum over the ranks."""
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
        # Not left to grouped_allreduce: that gives slices the dense shapes of other gradients, and no names.
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
    """What a distributed optimizer does differently; comes before the wrapped class.

    Registered for pickles, which call all by this name: another process may not have made the subclass yet.
    """

    _wrapped: type[keras.optimizers.Optimizer]
    _averager: _Averager

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "_averager", _Averager())
        super().__init__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "loss_scale_factor":
            # A LossScaleOptimizer resets this of the optimizer that it is put around, and tells it nothing else of itself.
            _agree(sys._getframe(1).f_locals.get("self"), self)

    def get_config(self) -> dict[str, Any]:
        """Return the wrapped optimizer's config and, other than for a file, how it averages."""
        config: dict[str, Any] = super().get_config()
        return config if _writing_a_file() else config | {"distributed": self._averager.get_config()} | _name_of(self)

    @classmethod
    def from_config(cls, config: dict[str, Any], **kwargs: Any) -> _Distributed:
        """Return a distributed optimizer, with accumulators of its own."""
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
        """Leave the gradient of a variable, of Keras or TensorFlow, to each rank. See `PartialDistributedOptimizer`."""
        if not hasattr(var, "assign"):
            raise ValueError(f"a local variable has to be a Keras or TensorFlow variable. Received: {var!r}")
        self._averager.register_local([var])

    def check_finite(self, grads: Sequence[Gradient]) -> tf.Tensor:
        """Return, in a LossScaleOptimizer, whether the gradients are finite: on every rank, if some are each rank's own."""
        finite = super().check_finite(grads)
        return self._averager.all_ranks(finite) if self._averager.local_variables else finite

    def apply(self, grads: Sequence[Gradient], trainable_variables: Sequence[Any] | None = None) -> None:
        """Average the gradients, then do as the wrapped optimizer does."""
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, keras.optimizers.LossScaleOptimizer) and not isinstance(caller, _Distributed | _Agreeing):
            raise RuntimeError(
                "an optimizer inside a LossScaleOptimizer was made distributed: ranks would not agree which steps to skip. Use "
                f"`DistributedOptimizer(loss_scale_optimizer)`. Received: {caller!r}"
            )
        averager = self._averager
        averager.applied = True
        _check_model_in_training(averager.process_set)
        if averager.passes > 1:
            self._accumulate(list(grads), trainable_variables)
        else:
            super().apply(averager.average(grads, self._variables_of(trainable_variables)), trainable_variables)

    def _variables_of(self, trainable_variables: Sequence[Any] | None) -> Sequence[Any]:
        """The variables that the gradients belong to."""
        if self._averager.local_variables and getattr(getattr(self, "inner_optimizer", self), "global_clipnorm", None):
            raise ValueError(
                "`global_clipnorm` needs the gradients of all variables to be the same on every rank: where some are each "
                "rank's own, ranks would scale the others differently. Take `clipnorm` or `clipvalue`. "
                f"Received: {self!r} with local variables"
            )
        return self._trainable_variables if trainable_variables is None else trainable_variables

    def _accumulate(self, grads: list[Gradient], trainable_variables: Sequence[Any] | None) -> None:
        if trainable_variables is not None and not self.built:  # creates variables, impossible in a branch
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
            if i in overwriting:  # as Keras accumulates them
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
    """A LossScaleOptimizer around a distributed optimizer; comes before the wrapped class.

    Under mixed_float16 `compile()` puts one around ours, and that looks at gradients not averaged yet: a rank that skips the
    step alone would leave the others waiting.
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
    """The class of a mixin before a wrapped class, which Keras knows by a name of ours, and in a file as the wrapped one."""

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
    """The subclass for a wrapped class by the name that Keras has for it."""
    wrapped: Any = keras.saving.get_registered_object(name) or getattr(keras.optimizers, name, None)
    if wrapped is None:
        raise ValueError(
            "the class of a distributed optimizer is not known here: import it, decorated with "
            f"`@keras.saving.register_keras_serializable()`. Received: {name!r}"
        )
    return _subclass(_Distributed, wrapped)


def _name_of(optimizer: _Distributed) -> dict[str, Any]:
    return {"wrapped": keras.saving.get_registered_name(optimizer._wrapped)} if _pickling() else {}


def _unpickle(file: io.BytesIO) -> Any:
    """Keras's; a function of this module, so that who unpickles an optimizer has it."""
    return keras.optimizers.Optimizer._unpickle_model(file)


def _writing_a_file() -> bool:
    """Whether Keras is about to put a config into a `.keras` or a legacy `.h5` file; it does not tell in any public way."""
    get = global_state.get_global_attribute
    written = get("shared_objects/id_to_config_map") is not None or bool(get("use_legacy_config"))
    return written and not _pickling()


def _pickling() -> bool:
    """Whether that is for `copy.deepcopy` or pickle, of an optimizer or of the model around it."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not KerasSaveable.__reduce__.__code__:
        frame = frame.f_back
    return frame is not None


def _check_model_in_training(process_set: ProcessSet) -> None:
    """Run the training checks on the model whose training step called the optimizer."""
    if horovod.size(ranks.require(), process_set) == 1:
        return
    frame: Any = sys._getframe(2)  # Keras passes an optimizer its variables only, not the model
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
    """The `tf.Variable` behind a Keras variable; anything else as it is."""
    return source.value if isinstance(source, keras.Variable) else source


def overwrites(variable: Any) -> bool:
    """Whether a variable takes its "gradient" as its value: float8 training computes scales and largest inputs so."""
    return bool(getattr(variable, "overwrite_with_gradient", False))


def optimizers_of(model: keras.layers.Layer) -> list[keras.optimizers.Optimizer]:
    """Return the optimizers that a model and the models in it hold: `model.optimizer` and all in other attributes.

    An optimizer that is inside another one (LossScaleOptimizer, MultiOptimizer) counts with that one.
    """
    found = {id(one): one for _, layer in _walk(model, "", set()) for one in _own_optimizers(layer).values()}
    inner = {id(one) for outer in found.values() for one in members(outer)}
    return [optimizer for optimizer in found.values() if id(optimizer) not in inner]


def require_built(model: Any) -> None:
    """Build `model.optimizer`, and raise if the model holds another optimizer that is not built: its state cannot be kept."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
    outer = {id(one) for one in optimizers_of(model)}
    unbuilt = [name for name, one in _own_optimizers(model).items() if not one.built and id(one) in outer]
    if unbuilt:
        raise ValueError(
            "the model holds optimizers that are not built, so that their state cannot be kept. Build each with the variables "
            f"that it trains: `model.{unbuilt[0]}.build(variables)`. Received: model {model.name!r} with {unbuilt}, not built"
        )


def _own_optimizers(layer: keras.layers.Layer) -> dict[str, Any]:
    """The optimizers in a layer's attributes, also in lists and dictionaries, by name: "d_optimizer", "optimizers.0"."""
    held: dict[int, tuple[str, Any]] = {}
    # Public names first: Keras and TensorFlow hold some objects under private names, too.
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
    """The optimizers inside of an optimizer."""
    return [one for member in _direct_members(optimizer) for one in (member, *members(member))]


def _direct_members(optimizer: Any) -> list[Any]:
    """The optimizer in a LossScaleOptimizer, those in a MultiOptimizer."""
    inner = getattr(optimizer, "inner_optimizer", None)
    return list(getattr(optimizer, "optimizers", ())) if inner is None else [inner]


def is_distributed(optimizer: object) -> bool:
    """Whether an optimizer averages over the ranks: itself, or those inside of it (of a MultiOptimizer, all)."""
    if isinstance(optimizer, _Distributed):
        return True
    direct = _direct_members(optimizer)
    return bool(direct) and all(map(is_distributed, direct))


def is_new(optimizer: Any) -> bool:
    """Whether an optimizer has not been applied since it is distributed: steps that were traced before do not average."""
    every = [optimizer, *members(optimizer)]
    return any(isinstance(one, _Distributed) and not one._averager.applied for one in every)


def forget_gradients(optimizer: Any) -> None:
    """Give up the gradients of `backward_passes_per_step` that were not applied yet."""
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

    The optimizer itself is changed and returned, so that one loaded with a model keeps its state. Wrap before the model is
    trained, or train on with `BroadcastVariablesCallback`, which has the step traced anew. Its copies are distributed, too: by
    `from_config`, `copy.deepcopy`, pickle and `clone_model`, of it or of its model. A saved model holds the plain optimizer and
    loads where there is no Horovod; to continue, use `load_model`, or wrap `model.optimizer` again.

    Under float16, `DistributedOptimizer(LossScaleOptimizer(...))` is faster than the other way round, which is what
    `compile()` makes of it by itself: outside, a LossScaleOptimizer costs one more (small) collective per step.

    Args:
        optimizer: Any `keras.optimizers.Optimizer`, built or not.
        name: The prefix of the names of the collectives, the same on all ranks. Where several optimizers have it (copies, or by
            default all), they are counted in the order in which they first exchange gradients.
        process_set: The `hvd.ProcessSet` to average over. Defaults to all ranks.
        backward_passes_per_step: The number of batches whose gradients are averaged locally before one exchange and
            one update. Everything that counts steps (schedules, EMA) counts updates, as with a larger batch; the
            optimizer must always be applied to the same variables. Sparse gradients become dense.
        compression: One of `hvd.Compression`, for dense gradients. Defaults to none.
        sparse_as_dense: Whether to add up `tf.IndexedSlices` into dense gradients instead of gathering the slices of
            all ranks; faster where most rows are touched.
        op: `hvd.Average`, which is what this does; for scripts that say so.
        average_aggregated_gradients: `True`, likewise: the gradients of `backward_passes_per_step` batches are averaged.
        gradient_predivide_factor: Dense gradients are divided by it before they are added up, and multiplied with it after.
        scale_local_gradients: Whether gradients of variables that `register_local_var()` of the optimizer leaves to each rank
            are divided by the number of ranks.
        device_dense: What Horovod takes and this has no use for: gradients are exchanged where they are.
        device_sparse: Likewise.
        num_groups: What Horovod takes and this has no use for: all gradients of a dtype are one group.
        groups: Likewise.

    Raises:
        TypeError: If `optimizer` is not a Keras 3 optimizer.
        ValueError: If it or an optimizer in it is distributed already, or `backward_passes_per_step` is less than 1.
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
    if any(map(is_distributed, (optimizer, *members(optimizer)))):
        raise ValueError(f"`optimizer` is a DistributedOptimizer already. Received: {optimizer!r}")
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
    averager.is_alone()  # raises if Horovod is not ready or this rank has no business in the process set
    return _distribute(optimizer, averager)


def _check_averaging(op: Any, average_aggregated_gradients: bool, passes: int) -> None:
    """Refuse the sums that Horovod's optimizer can do: with them a script would train with other learning rates."""
    if op is not None and op != ranks.require().Average:
        raise ValueError(f"gradients are averaged: multiply the learning rate instead. Received: op={op}")
    if passes > 1 and not average_aggregated_gradients:
        raise ValueError(
            "the gradients of several batches are averaged: multiply the learning rate by `backward_passes_per_step` instead. "
            f"Received: average_aggregated_gradients=False, backward_passes_per_step={passes}"
        )


def PartialDistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    *,
    local_layers: keras.layers.Layer | Iterable[keras.layers.Layer] | None = None,
    **options: Any,
) -> keras.optimizers.Optimizer:
    """Make an optimizer distributed but for the gradients of some layers, which each rank applies alone.

    Those gradients are divided by the number of ranks (`scale_local_gradients=False`: they are not), so that they weigh as
    they would in the average. `BroadcastVariablesCallback(local_variables=...)` leaves the variables to each rank, too. The
    optimizer cannot be copied (a copy would not know the layers), and a file holds the plain one, as always.

    Args:
        optimizer: See `DistributedOptimizer`.
        name: Likewise.
        local_layers: A layer, or several, built, whose variables are each rank's own.
        options: The other arguments of `DistributedOptimizer`.

    Raises:
        ValueError: If `local_layers` holds anything but layers, or one that has no variables yet; as `DistributedOptimizer`
            does. When it is applied: if it has a `global_clipnorm`, by which ranks would go apart.

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
    """The variables of a `local_layers` argument."""
    layers = [layers] if isinstance(layers, keras.layers.Layer) else list(layers or ())
    for layer in layers:
        if not isinstance(layer, keras.layers.Layer) or not layer.built:
            raise ValueError(f"`local_layers` have to be Keras layers, and built. Received: {layer!r}")
    return [variable for layer in layers for variable in layer.trainable_variables]
