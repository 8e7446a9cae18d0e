"""``SyncBatchNormalization``: the Keras layer. It trains on Keras's TensorFlow backend.

Keras's own layer does everything but the training step: weights, config and evaluation are inherited, so an exported model
needs neither Horovod nor the native library.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras

from hvd_syncbn import native
from hvd_syncbn.horovod import ranks_of
from hvd_syncbn.tf_impl.keras import ranks

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet

    from hvd_syncbn.tf_impl.ranks import Group

_OLDEST = (3, 10)  # that was tried and found right in everything: docs/versions.md


def warn_if_older(version: str) -> None:
    """Warns of a Keras in which a layer may become local without a word."""
    if native.is_older(version, _OLDEST):
        warnings.warn(
            f"hvd-syncbn is tried with Keras {'.'.join(map(str, _OLDEST))} and newer. Older ones (seen in 3.8 and 3.9) make "
            "Keras's own layers of converted and frozen ones where a saved model with a class of its own is loaded: they "
            f"are not synchronized there. Received: {version}",
            stacklevel=2,
        )


warn_if_older(keras.__version__)


@keras.saving.register_keras_serializable("hvd_syncbn")
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras's own layer, that can be frozen: what `freeze_batchnorm` makes of a `keras.layers.BatchNormalization`.

    Its config says so. `trainable` is that of the unfrozen layer when it is set, and False when it is read of one whose `gamma`
    and `beta` are frozen, too: setting it on a model above thaws nothing.
    """

    frozen: str | None = None
    """None, `"statistics"` (`gamma` and `beta` go on learning), or `"all"`."""

    def freeze(self, affine: bool) -> None:
        """Use the moving statistics in training, too; `affine`: `gamma` and `beta` go on learning."""
        self.frozen = "statistics" if affine else "all"
        self._learned = tuple(v.name for v in self._affine_variables() if v.trainable)
        self._hold()

    def unfreeze(self) -> None:
        """Undo `freeze`."""
        for variable in self._affine_variables():
            variable.trainable = variable.name in self._learned
        del self.frozen, self._learned

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the weights."""
        super().build(input_shape)
        if self.frozen:
            self._learned = tuple(v.name for v in self._affine_variables() if self._trainable)
            self._hold()

    @property
    def trainable(self) -> bool:
        """Whether anything of the layer learns."""
        return bool(self._trainable) and self.frozen != "all"

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.BatchNormalization.trainable.fset(self, value)
        if self.frozen:
            self._learned = tuple(v.name for v in self._affine_variables() if value)
            self._hold()

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize `inputs`."""
        return super().call(inputs, training=training and self.frozen is None, mask=mask)

    def get_config(self) -> dict[str, Any]:
        """Keras's config of the layer, and whether it is frozen."""
        config = {**super().get_config(), "trainable": self._trainable}
        return config | {"frozen": self.frozen} if self.frozen else config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BatchNormalization:
        """The layer of a config."""
        layer: BatchNormalization = super().from_config({k: v for k, v in config.items() if k != "frozen"})
        if config.get("frozen"):
            layer.freeze(affine=config["frozen"] == "statistics")
        return layer

    def save_own_variables(self, store: Any) -> None:
        """Save the weights as Keras's layer does, and beside them, where there is room, what `load_model` has to know."""
        super().save_own_variables(store)
        attributes = getattr(getattr(store, "_h5_entry_group", None), "attrs", None)
        if attributes is not None:
            attributes[RECORD] = json.dumps(self._record())

    def _record(self) -> dict[str, Any]:
        return {"frozen": self.frozen}

    def _affine_variables(self) -> list[Any]:
        return [v for v in (self.gamma, self.beta) if v is not None]

    def _hold(self) -> None:
        for variable in self._affine_variables() if self.frozen == "all" else ():
            variable.trainable = False


@keras.saving.register_keras_serializable("hvd_syncbn", "SyncBatchNormalization")
class SyncBatchNormalization(BatchNormalization):
    """Layer that normalizes its inputs over the batch of all Horovod ranks.

    It takes the place of `keras.layers.BatchNormalization`, with the same weights. In training, its outputs, input gradients
    and moving statistics have the same bits however the batch is dealt out to the ranks: as on one rank that has it all. That
    takes one Horovod allreduce forward and one backward. In evaluation it is Keras's layer.

    The gradients of `gamma` and `beta` are this rank's part of the sum; `DistributedOptimizer` averages them with the other
    parameters' gradients. The layer cannot be differentiated twice in training, nor compiled by XLA (`compile()` knows).

    Differences from Keras's layer: a batch of one value per channel is an error in training; a batch without any unmasked
    position leaves the moving statistics alone; a mask needs `axis=-1`. Training needs the TensorFlow backend.

    Files of weights and models cross between this layer and Keras's in both directions. To that end both classes have the same
    `__name__`: Keras stores the members of lists under the names of their classes, and `model.summary()` shows those, too;
    `repr(layer)` tells them apart.

    A layer made by hand calls its collectives by its `name`, which has to be the same on every rank: make the same layers in
    the same order on each, or name them. `convert_sync_batchnorm` calls them by the model and their place in it.

    Args:
        axis: Integer, the axis that should be normalized (typically the features axis): -1 for channels last, 1 for channels
            first. Others work and cost transpositions.
        momentum: Momentum for the moving average; `None` averages over all batches.
        epsilon: Small float added to variance to avoid dividing by zero.
        center: If `True`, add offset of `beta` to normalized tensor.
        scale: If `True`, multiply by `gamma`.
        process_set: Horovod process set whose ranks share the batch, or the list of their ranks; `None` for all. A saved model
            holds the ranks. A process set of just these ranks has to be registered when it is trained again.
        activation: `None`, or `"relu"`, fused in both directions.
        unbiased_variance: Whether the moving variance takes `n / (n - 1)` times the batch's variance, as PyTorch does.
        zero_debias: Whether the moving statistics are Caffe's average, in which the 0 and 1 that they started from have no
            weight: with `s = momentum * s + 1` in every batch, the batch weighs `1 / s`. Its variance is the unbiased one. As
            with a momentum of `None`, the layer has one weight more, the number of batches.
        **kwargs: The other arguments of `keras.layers.BatchNormalization`. `renorm` and `synchronized` are refused.

    Call arguments:
        inputs: Input tensor of at least 2 dims. Ranks may have different numbers of samples, also none.
        training: Python boolean indicating whether the layer should behave in training mode or in inference mode.
        mask: Tensor with one dimension less than `inputs`, whose true positions the mean and variance are computed over.
        residual: Tensor like `inputs` that is added before the activation.

    Reference:

    - [Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167).

    As with Keras's layer, `trainable = False` means inference mode.
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        *,
        process_set: ProcessSet | Sequence[int] | None = None,
        activation: str | None = None,
        unbiased_variance: bool = False,
        zero_debias: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, why in _REFUSED.items():
            if kwargs.get(name):
                raise ValueError(f"SyncBatchNormalization {why}. Received: {name}={kwargs[name]}")
        kwargs.pop("virtual_batch_size", None)
        if activation not in (None, "relu"):
            raise ValueError(f'`activation` has to be None or "relu". Received: activation={activation!r}')
        super().__init__(
            axis=axis, momentum=1.0 if momentum is None else momentum, epsilon=epsilon, center=center, scale=scale, **kwargs
        )
        self.momentum = momentum
        if zero_debias:  # what is converted is without
            self.zero_debias = True
        self.process_set = held(process_set)
        self.activation = activation
        self.unbiased_variance = unbiased_variance
        self.collective_name = self.name
        self.supports_jit = False

    zero_debias = False

    @property
    def averages(self) -> bool:
        """Whether the weights of the moving average follow from the number of batches."""
        return self.momentum is None or self.zero_debias

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the weights."""
        super().build(input_shape)
        if self.averages:
            self.batches = self.add_weight(
                name="batches", shape=(), dtype="int64", initializer="zeros", trainable=False, autocast=False
            )

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None, residual: Any = None) -> Any:
        """Normalize `inputs`."""
        if residual is not None and not _may_be_equal(residual.shape, inputs.shape):
            raise ValueError(
                f"`residual` has to have the shape of the inputs. Received: residual.shape={residual.shape}, "
                f"inputs.shape={inputs.shape}"
            )
        backend = keras.backend.backend()
        if training and self.frozen and backend == "tensorflow":
            return keras.ops.cast(_train_frozen(self, inputs, residual), self.compute_dtype)
        if not (training and self.trainable) or self.frozen:
            outputs = super().call(inputs, training=False, mask=mask)
            if residual is not None:
                outputs = outputs + residual
            return keras.ops.relu(outputs) if self.activation == "relu" else outputs
        if mask is None and residual is not None:
            # Keras hands masks to layers of one tensor only.
            mask = getattr(inputs, "_keras_mask", None)
        group = self._group()
        if group.size > 1:
            for check in ranks.training_checks:
                check(self._get_call_context().entry_layer, False)
        return keras.ops.cast(_train(self, inputs, mask, residual, group), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Keras's config of the layer and ours. A process set becomes the list of its ranks."""
        return super().get_config() | self._own_config()

    def _own_config(self) -> dict[str, Any]:
        """What Keras's layer does not have."""
        own = {
            "process_set": ranks_of(self.process_set),
            "activation": self.activation,
            "unbiased_variance": self.unbiased_variance,
            "zero_debias": self.zero_debias,
        }
        # What conversion called it is still the same on every rank when the model is loaded.
        return own if self.collective_name == self.name else own | {"collective_name": self.collective_name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SyncBatchNormalization:
        """The layer of a config."""
        layer: SyncBatchNormalization = super().from_config({k: v for k, v in config.items() if k != "collective_name"})
        layer.collective_name = config.get("collective_name", layer.name)
        return layer

    def _record(self) -> dict[str, Any]:
        return super()._record() | self._own_config() | {"collective_name": self.collective_name}

    def __repr__(self) -> str:
        """Return Keras's words, with the name that tells it from Keras's layer."""
        return f"<SyncBatchNormalization name={self.name}, built={self.built}>"

    def _group(self) -> Group:
        """Return the group of ranks that share the batch: a saved model has only the ranks' numbers."""
        return ranks.find(self.process_set, f"layer {self.collective_name!r}")


# Keras stores the members of lists under their classes' names, and counts layers' names by them. Pickle uses __qualname__.
SyncBatchNormalization.__name__ = keras.layers.BatchNormalization.__name__

RECORD = "hvd_syncbn"
"""The HDF5 attribute beside a layer's weights that says it was ours (synchronized, frozen), and how, as JSON."""


_REFUSED = {
    "renorm": "does no batch renormalization",
    "synchronized": "synchronizes by itself, under Horovod and under a tf.distribute strategy: leave `synchronized` out",
    "virtual_batch_size": "normalizes over the batch of all ranks, not over parts of it",
}


def renormalizes(layer: Any) -> bool:
    """Whether a layer of Keras does batch renormalization, which older versions of Keras do not know."""
    return getattr(layer, "renorm", False)


def held(process_set: ProcessSet | Sequence[int] | None) -> ProcessSet | tuple[int, ...] | None:
    """A process set as a layer holds it: ranks as a tuple, since Keras would track a list."""
    return process_set if process_set is None or hasattr(process_set, "ranks") else tuple(process_set)


def _may_be_equal(a: Sequence[int | None], b: Sequence[int | None]) -> bool:
    return len(a) == len(b) and all(m is None or n is None or m == n for m, n in zip(a, b, strict=True))


def _train(layer: SyncBatchNormalization, inputs: Any, mask: Any, residual: Any, group: Group) -> Any:
    from hvd_syncbn.tf_impl.functional import sync_batch_norm

    outputs, moving_mean, moving_variance = sync_batch_norm(
        inputs,
        layer.gamma,
        layer.beta,
        layer.moving_mean,
        layer.moving_variance,
        training=True,
        momentum=layer.momentum,
        epsilon=layer.epsilon,
        axis=layer.axis,
        mask=mask,
        residual=residual,
        activation=layer.activation,
        unbiased_variance=layer.unbiased_variance,
        zero_debias=layer.zero_debias,
        batches=layer.batches if layer.averages else None,
        process_set=group,
        name=layer.collective_name,
    )
    layer.moving_mean.assign(moving_mean)
    layer.moving_variance.assign(moving_variance)
    if layer.averages:
        layer.batches.assign_add(1)
    return outputs


def _train_frozen(layer: SyncBatchNormalization, inputs: Any, residual: Any) -> Any:
    from hvd_syncbn.tf_impl.functional import frozen_batch_norm

    return frozen_batch_norm(
        inputs,
        layer.gamma,
        layer.beta,
        layer.moving_mean,
        layer.moving_variance,
        epsilon=layer.epsilon,
        axis=layer.axis,
        residual=residual,
        activation=layer.activation,
        learns=layer.trainable,
        name=layer.collective_name,
    )
