"""The Keras layer ``SyncBatchNormalization``. Training needs Keras's TensorFlow backend.

Only the training step is new. Weights, config and evaluation are inherited from Keras's layer, so an exported model needs
neither Horovod nor the native library.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras

from hvd_syncbn import native
from hvd_syncbn.horovod import ranks_of
from hvd_syncbn.renorm import Statistics, bounds_of
from hvd_syncbn.tf_impl.keras import ranks

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet

    from hvd_syncbn.tf_impl.keras.accumulate import Total
    from hvd_syncbn.tf_impl.ranks import Group

_OLDEST = (3, 10)  # the oldest tested version without known problems: docs/versions.md


def warn_if_older(version: str) -> None:
    """Warn if this version of Keras may load layers as silently unsynchronized."""
    if native.is_older(version, _OLDEST):
        warnings.warn(
            f"hvd-syncbn is tested with Keras {'.'.join(map(str, _OLDEST))} and newer. Older versions (seen in 3.8 and 3.9) "
            "load the converted and frozen layers of a custom class as plain Keras layers, which are not synchronized. "
            f"Received: Keras {version}. Upgrade Keras.",
            stacklevel=2,
        )


warn_if_older(keras.__version__)


@keras.saving.register_keras_serializable("hvd_syncbn")
class BatchNormalization(keras.layers.BatchNormalization):
    """A `keras.layers.BatchNormalization` that can be frozen. `freeze_batchnorm` converts layers to this class.

    The config of a frozen layer contains `frozen`. Setting `trainable` sets the value for the unfrozen layer. Reading it
    returns False while `gamma` and `beta` are frozen. Setting `trainable` on an enclosing model therefore unfreezes nothing.
    """

    frozen: str | None = None
    """None, `"statistics"` (`gamma` and `beta` are still trained), or `"all"`."""

    def freeze(self, affine: bool) -> None:
        """Use the moving statistics in training, too. With `affine`, `gamma` and `beta` are still trained."""
        self.frozen = "statistics" if affine else "all"
        self._learned = tuple(v.name for v in self._affine_variables() if v.trainable)
        self._hold()

    def unfreeze(self) -> None:
        """Undo `freeze`."""
        for variable in self._affine_variables():
            variable.trainable = variable.name in self._learned
        del self.frozen, self._learned

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the weights."""
        super().build(input_shape)
        if self.frozen:
            self._learned = tuple(v.name for v in self._affine_variables() if self._trainable)
            self._hold()

    @property
    def trainable(self) -> bool:
        """Whether the layer has trainable weights."""
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
        """Return the config of Keras's layer, with `frozen` if the layer is frozen."""
        config = {**super().get_config(), "trainable": self._trainable}
        return config | {"frozen": self.frozen} if self.frozen else config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BatchNormalization:
        """Create a layer from its config."""
        layer: BatchNormalization = super().from_config({k: v for k, v in config.items() if k != "frozen"})
        if config.get("frozen"):
            layer.freeze(affine=config["frozen"] == "statistics")
        return layer

    def save_own_variables(self, store: Any) -> None:
        """Save the weights as Keras's layer does. In an HDF5 file, also save the record that `load_model` reads."""
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

    It replaces `keras.layers.BatchNormalization` and has the same weights. In training, its outputs, input gradients and
    moving statistics are bitwise identical for every split of the batch over the ranks, including one rank with the whole
    batch. This takes one Horovod allreduce in each direction. In evaluation it is Keras's layer.

    The gradients of `gamma` and `beta` are this rank's share of the sum; `DistributedOptimizer` averages them like all other
    gradients. In training, XLA cannot compile the layer (`compile()` disables XLA by default).

    Differences from Keras's layer: in training, a global batch with one value per channel is an error; a batch in which every
    position is masked does not change the moving statistics; a mask covers the inputs without the axis of the channels, also
    with `axis=1`. Training needs the TensorFlow backend.

    Weight files and model files can be exchanged with Keras's layer in both directions. For this, both classes have the same
    `__name__`, because Keras stores the members of lists under their class names. `model.summary()` shows that name;
    `repr(layer)` tells the classes apart.

    A layer that is constructed directly uses its `name` for its collectives. The name must be the same on every rank: create
    the same layers in the same order on every rank, or name them. `convert_sync_batchnorm` names the collectives by the model
    and the layer's path in it.

    Args:
        axis: Integer, the axis that should be normalized (typically the features axis): -1 for channels last, 1 for channels
            first. Any other axis works, at the cost of transposing the tensors.
        momentum: Momentum for the moving average; `None` averages over all batches.
        epsilon: Small float added to variance to avoid dividing by zero.
        center: If `True`, add offset of `beta` to normalized tensor.
        scale: If `True`, multiply by `gamma`.
        process_set: Horovod process set whose ranks share the batch, or a list of their ranks; `None` for all ranks. A saved
            model contains the ranks. To train it again, register a process set with exactly these ranks first.
        activation: `None`, or `"relu"`, fused in both directions.
        unbiased_variance: Whether the moving variance is updated with `n / (n - 1)` times the batch variance, as in PyTorch.
        zero_debias: Whether the moving statistics are Caffe's average, in which the initial values 0 and 1 have no weight: with
            `s = momentum * s + 1` in every batch, the batch has weight `1 / s`. The variance is the unbiased one. As with
            `momentum=None`, the layer has one more weight, the number of batches.
        skip_nonfinite: Whether a channel that is NaN or infinite in a batch, on any rank, keeps its moving statistics, so that
            one overflow does not make evaluation NaN. `False` makes them NaN, as in Keras's layer. Outputs and gradients of the
            channel are NaN in both cases.
        **kwargs: The other arguments of `keras.layers.BatchNormalization`. `synchronized` is not supported. With
            `renorm`, `r` and `d` are computed from the statistics of the batch of all ranks.

    Call arguments:
        inputs: Input tensor with at least 2 dimensions. Ranks may have different numbers of samples, including none.
        training: Python boolean indicating whether the layer should behave in training mode or in inference mode.
        mask: Tensor with the shape of `inputs` without `axis`. Mean and variance are computed over its true positions.
        residual: Tensor with the shape of `inputs`, added before the activation.

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
        skip_nonfinite: bool = True,
        **kwargs: Any,
    ) -> None:
        for name, why in _REFUSED.items():
            if kwargs.get(name):
                raise ValueError(f"SyncBatchNormalization {why}. Received: {name}={kwargs[name]}. Remove the argument.")
        kwargs.pop("virtual_batch_size", None)
        if kwargs.get("renorm"):
            _check_renorm(kwargs.get("renorm_clipping"), momentum, unbiased_variance, zero_debias)
        if activation not in (None, "relu"):
            raise ValueError(f'`activation` must be None or "relu". Received: activation={activation!r}')
        super().__init__(
            axis=axis, momentum=1.0 if momentum is None else momentum, epsilon=epsilon, center=center, scale=scale, **kwargs
        )
        self.momentum = momentum
        if zero_debias:  # converted layers only have the class attribute
            self.zero_debias = True
        if not skip_nonfinite:
            self.skip_nonfinite = False
        self.process_set = held(process_set)
        self.activation = activation
        self.unbiased_variance = unbiased_variance
        self.collective_name = self.name
        self.supports_jit = False

    zero_debias = False
    skip_nonfinite = True

    _total: Total | None = None
    """What the layer sums instead of updating its moving statistics in every step; see `accumulate_statistics`."""

    @property
    def averages(self) -> bool:
        """Whether the weights of the moving average depend on the number of batches."""
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
                f"`residual` must have the shape of the inputs. Received: residual.shape={residual.shape}, "
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
            # Keras passes masks only to layers with one input tensor.
            mask = getattr(inputs, "_keras_mask", None)
        check_mask(self.axis, inputs, mask)
        group = self._group()
        if group.size > 1:
            for check in ranks.training_checks:
                check(self._get_call_context().entry_layer, False)
        return keras.ops.cast(_train(self, inputs, mask, residual, group), self.compute_dtype)

    def _take_statistics(self, packet: Any) -> None:
        """Take the reduced packet of a batch into the moving statistics, as a training step does."""
        if self._total is None:
            self._update_statistics(packet, 1)
        else:
            self._total.packets.assign_add(packet)
            self._update_statistics(*self._total.count_batch())

    def _update_statistics(self, packet: Any, batches: Any) -> None:
        """Update the moving statistics by a reduced packet, and count the batches."""
        if renormalizes(self):
            self._update_renorm_statistics_by(packet)
            return
        from hvd_syncbn.tf_impl.functional import updated_statistics

        moving_mean, moving_variance = updated_statistics(
            packet,
            self.moving_mean,
            self.moving_variance,
            momentum=self.momentum,
            unbiased_variance=self.unbiased_variance,
            zero_debias=self.zero_debias,
            skip_nonfinite=self.skip_nonfinite,
            batches=self.batches if self.averages else None,
            epsilon=self.epsilon,
            layer=self.collective_name,
        )
        self.moving_mean.assign(moving_mean)
        self.moving_variance.assign(moving_variance)
        if self.averages:
            self.batches.assign_add(batches)

    def _update_renorm_statistics_by(self, packet: Any) -> None:
        from hvd_syncbn.tf_impl.renorm import updated_statistics

        assert self.momentum is not None
        variables = Statistics(self.moving_mean, self.moving_variance, self.moving_stddev, self.renorm_mean, self.renorm_stddev)
        weights = self.momentum, self.renorm_momentum
        new = updated_statistics(packet, variables, *weights, self.skip_nonfinite, self.epsilon, self.collective_name)
        for variable, value in zip(variables, new, strict=True):
            variable.assign(value)

    def get_config(self) -> dict[str, Any]:
        """Return the config of Keras's layer and the arguments of this one. A process set becomes the list of its ranks."""
        return super().get_config() | self._own_config()

    def _own_config(self) -> dict[str, Any]:
        """Return the settings that Keras's layer does not have."""
        own = {
            "process_set": ranks_of(self.process_set),
            "activation": self.activation,
            "unbiased_variance": self.unbiased_variance,
            "zero_debias": self.zero_debias,
            "skip_nonfinite": self.skip_nonfinite,
        }
        # A name that `convert_sync_batchnorm` chose must be the same on every rank when the model is loaded.
        return own if self.collective_name == self.name else own | {"collective_name": self.collective_name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SyncBatchNormalization:
        """Create a layer from its config."""
        layer: SyncBatchNormalization = super().from_config({k: v for k, v in config.items() if k != "collective_name"})
        layer.collective_name = config.get("collective_name", layer.name)
        return layer

    def _record(self) -> dict[str, Any]:
        return super()._record() | self._own_config() | {"collective_name": self.collective_name}

    def __repr__(self) -> str:
        """Return Keras's representation with the name of this class."""
        return f"<SyncBatchNormalization name={self.name}, built={self.built}>"

    def _group(self) -> Group:
        """Return the group of ranks that share the batch."""
        return ranks.find(self.process_set, f"layer {self.collective_name!r}")


# Keras derives file entries of list members and default layer names from `__name__`. Pickle uses `__qualname__`.
SyncBatchNormalization.__name__ = keras.layers.BatchNormalization.__name__

RECORD = "hvd_syncbn"
"""HDF5 attribute next to a layer's weights: the settings of a synchronized or frozen layer, as JSON."""


_REFUSED = {
    "synchronized": "synchronizes by itself, under Horovod and under a tf.distribute strategy: leave `synchronized` out",
    "virtual_batch_size": "normalizes over the batch of all ranks, not over parts of it",
}


def _check_renorm(
    clipping: dict[str, float] | None, momentum: float | None, unbiased_variance: bool, zero_debias: bool
) -> None:
    if not hasattr(keras.layers.BatchNormalization, "_renorm_correction_and_moments"):
        raise ValueError(
            "this version of Keras has no batch renormalization. "
            f"Received: renorm=True with Keras {keras.__version__}. Use a version newer than 3.12."
        )
    if momentum is None or unbiased_variance or zero_debias:
        raise ValueError(
            "renorm averages the biased standard deviation with a momentum. Received: renorm=True with "
            f"momentum={momentum}, unbiased_variance={unbiased_variance}, zero_debias={zero_debias}. Leave these arguments out."
        )
    bounds_of(clipping)


def renormalizes(layer: Any) -> bool:
    """Return whether a Keras layer does batch renormalization. Older versions of Keras lack the attribute."""
    return getattr(layer, "renorm", False)


def check_mask(axis: int, inputs: Any, mask: Any) -> None:
    """Raise `ValueError` for a mask of the layer before if the channels are not last: such a mask covers the last axis."""
    passed_on: Any = getattr(inputs, "_keras_mask", None)
    if passed_on is not None and mask is passed_on and axis not in (-1, len(inputs.shape) - 1):
        raise ValueError(
            "the mask of the layer before covers the inputs without their last axis, which is not the channels' axis here. "
            f"Received: axis={axis}, inputs.shape={inputs.shape}, mask.shape={passed_on.shape}. "
            "Pass a `mask` that has the shape of the inputs without `axis`, or use `axis=-1`"
        )


def held(process_set: ProcessSet | Sequence[int] | None) -> ProcessSet | tuple[int, ...] | None:
    """Return a process set as a layer stores it: ranks become a tuple, because Keras would track a list."""
    return process_set if process_set is None or hasattr(process_set, "ranks") else tuple(process_set)


def _may_be_equal(a: Sequence[int | None], b: Sequence[int | None]) -> bool:
    return len(a) == len(b) and all(m is None or n is None or m == n for m, n in zip(a, b, strict=True))


def _train(layer: SyncBatchNormalization, inputs: Any, mask: Any, residual: Any, group: Group) -> Any:
    from hvd_syncbn.tf_impl.functional import sync_batch_norm

    packets: list[Any] = []
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
        skip_nonfinite=layer.skip_nonfinite,
        batches=layer.batches if layer.averages else None,
        process_set=group,
        name=layer.collective_name,
        total=None if layer._total is None or renormalizes(layer) else layer._total.packets,
        correction=_correction(layer, inputs.dtype, packets) if renormalizes(layer) else None,
    )
    if renormalizes(layer):
        layer._take_statistics(*packets)
        return outputs
    if layer._total is not None:
        layer._update_statistics(*layer._total.count_batch())
        return outputs
    layer.moving_mean.assign(moving_mean)
    layer.moving_variance.assign(moving_variance)
    if layer.averages:
        layer.batches.assign_add(1)
    return outputs


def _correction(layer: SyncBatchNormalization, dtype: Any, packets: list[Any]) -> Callable[[Any], tuple[Any, Any]]:
    """Return the correction of batch renormalization, which adds the packet that it is called with to `packets`."""
    from hvd_syncbn.tf_impl.renorm import correction

    vectors = (layer.gamma, layer.beta, layer.renorm_mean, layer.renorm_stddev)
    corrected = correction(*vectors, bounds_of(layer.renorm_clipping), dtype, layer.epsilon, layer.collective_name)

    def keeping(packet: Any) -> tuple[Any, Any]:
        packets.append(packet)
        return corrected(packet)

    return keeping


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
