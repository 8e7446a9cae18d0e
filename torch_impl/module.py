"""``SyncBatchNorm``, its 1d, 2d and 3d forms, and its twin without the collective."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from hvd_syncbn import native
from hvd_syncbn.renorm import Clipping, Statistics, bounds_of
from hvd_syncbn.running import WITHOUT_STATISTICS, Running
from hvd_syncbn.torch_impl.functional import ACTIVATIONS, check_input, frozen_batch_norm, local_batch_norm, normalize
from hvd_syncbn.torch_impl.ops import forward_apply
from hvd_syncbn.torch_impl.renorm import renormalize, update_statistics

_made_by_hand = itertools.count()

# The attributes of a layer that updates its running statistics once in several steps.
ACCUMULATION = ("_batches_per_update", "_total", "_batches_in_total")

# The attributes and the buffers of a layer that does batch renormalization.
RENORM = ("renorm", "renorm_clipping", "renorm_momentum")
RENORM_BUFFERS = ("running_stddev", "renorm_mean", "renorm_stddev")

# torch.fx takes a layer for one node, and does not look inside, if `layer.__module__` is in torch.nn: its own tracers, those of
# quantization and those of image libraries alike. An attribute of the object, because pickle needs the class's to be true.
TRACED_AS_LEAF = {"__module__": "torch.nn"}

# Where a tracer looks inside all the same (the layer is its root), these are one node each.
torch.fx.wrap("check_input")
torch.fx.wrap("frozen_batch_norm")
torch.fx.wrap("local_batch_norm")
torch.fx.wrap("normalize")
torch.fx.wrap("renormalize")


def _is_proxy(value: object) -> bool:
    return isinstance(value, Proxy)


class BatchNorm(_BatchNorm):
    """Batch normalization of this rank's batch alone, for inputs of any dimension, with a residual and an activation.

    What ``revert_sync_batchnorm`` makes of a ``SyncBatchNorm`` that was not converted from another class. TorchScript compiles
    it, which is why its forward is written as it is.
    """

    # What TorchScript need not look at.
    __jit_ignored_attributes__: ClassVar[list[str]] = [
        "__module__",
        "process_set",
        "collective_name",
        "_converted_from",
        "renorm_clipping",
        "_renorm",
    ]
    __jit_unused_properties__: ClassVar[list[str]] = ["_fused"]
    __constants__ = [*_BatchNorm.__constants__, "_fused"]  # noqa: RUF012, as _BatchNorm declares it

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if activation not in ACTIVATIONS:
            raise ValueError(f"expected an activation of {ACTIVATIONS}. Received: {activation!r}")
        self.activation = activation
        self.__dict__.update(TRACED_AS_LEAF)

    @property
    def _fused(self) -> str | None:
        """The activation. Conversion puts None here in a user's subclass, whose own ``activation`` may be anything."""
        return self.activation

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions. Received: shape {input.shape}")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """As ``SyncBatchNorm``."""
        if torch.jit.is_scripting():  # noqa: SIM114, TorchScript leaves out the second branch only if it is one
            self._check_input_dim(input)
        elif not _is_proxy(input):
            self._check_input_dim(input)
        return self._normalize_locally(input, residual, self._fused)

    def _normalize_locally(self, input: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
        keeps = self.track_running_stats or not self.training
        return local_batch_norm(
            input,
            self.running_mean if keeps else None,
            self.running_var if keeps else None,
            self.num_batches_tracked if self.training and self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            self.momentum,
            self.eps,
            residual,
            activation,
        )

    def extra_repr(self) -> str:
        """The arguments of ``nn.BatchNorm``, and the activation."""
        text = str(super().extra_repr())
        return text if self._fused is None else f"{text}, activation={self._fused}"


class SyncBatchNorm(BatchNorm):
    r"""Batch normalization over the batch of all ranks, with the bits of one rank that had it all.

    Outputs, input gradients and running statistics depend on the global batch alone: the same bits for any number of ranks
    and any split of the samples, contiguous or channels last. One allreduce forward and one backward, of Horovod or
    torch.distributed. It takes the place of ``torch.nn.BatchNorm1d``, ``2d`` and ``3d``, with the same ``state_dict``.
    Conversion makes ``SyncBatchNorm1d``, ``2d`` and ``3d``, which are instances of those classes, too.

    Parameter gradients are this rank's share, as ``hvd.DistributedOptimizer`` and ``DistributedDataParallel`` expect them.
    Evaluation needs neither engine.

    Args:
        num_features: number of channels ``C``.
        eps: added to the variance.
        momentum: weight of the batch in the running statistics; None for the average over all batches.
        affine: whether there are a weight and a bias to learn.
        track_running_stats: whether running statistics are kept.
        process_set: the ranks that share the batch: a ``horovod.ProcessSet``, a ``torch.distributed.ProcessGroup`` or a 1-D
            ``DeviceMesh``. None is all ranks of Horovod if it is initialized, else those of torch.distributed. PyTorch cannot
            copy or pickle a layer that holds a ``ProcessGroup``; a ``DeviceMesh`` it can.
        activation: None, or ``"relu"``, fused in both directions.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        zero_debias: whether the running statistics are Caffe's average, in which the 0 and 1 that they started from have no
            weight: with ``s = (1 - momentum) * s + 1`` in every batch, the batch weighs ``1 / s``. It needs the count of
            batches, which is in the ``state_dict`` of every batch norm.
        skip_nonfinite: whether a channel that is NaN or infinite in a batch, on any rank, keeps its running statistics, so that
            one overflow does not make evaluation NaN. False makes them NaN, as in ``nn.BatchNorm``. Outputs and gradients of
            the channel are NaN in both cases.
        renorm: whether to do batch renormalization (https://arxiv.org/abs/1702.03275): training normalizes by the batch of all
            ranks and corrects by ``r`` and ``d``, so that outputs are close to those of evaluation. It adds the buffers
            ``running_stddev``, ``renorm_mean`` and ``renorm_stddev``, which Keras's layer calls ``moving_stddev``,
            ``renorm_mean`` and ``renorm_stddev``. ``running_var`` is then ``running_stddev ** 2 - eps``, without
            ``n / (n - 1)``.
        renorm_clipping: dictionary of bounds, each optional: ``rmin <= r <= rmax``, ``-dmax <= d <= dmax``. Without a bound
            they are 0, infinity and infinity.
        renorm_momentum: weight of the batch in ``renorm_mean`` and ``renorm_stddev``.

    Shape:
        - input: ``(N, C, *)``, float32, float64, float16 or bfloat16; `N` may differ between ranks and be 0
        - residual: as input, added before the activation
        - output: as input

    Example::

        hvd.init()
        model = convert_sync_batchnorm(torchvision_style_model)
        layer = SyncBatchNorm(64, activation="relu")
        y = layer(x, residual=shortcut)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_set: Any = None,
        activation: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        zero_debias: bool = False,
        skip_nonfinite: bool = True,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float] | None = None,
        renorm_momentum: float = 0.01,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, activation, device, dtype)
        if renorm:
            self._begin_renorm(renorm_clipping, renorm_momentum, momentum, zero_debias)
        self.process_set = process_set
        if zero_debias:  # what is converted is without
            self.zero_debias = True
        if not skip_nonfinite:
            self.skip_nonfinite = False
        # Layers are made in the same order on every rank, so the counter agrees; conversion names them by their path.
        self.collective_name = f"{type(self).__name__}{next(_made_by_hand)}"

    zero_debias = False
    skip_nonfinite = True
    renorm = False
    renorm_clipping: Mapping[str, float] | None = None
    renorm_momentum = 0.01
    _renorm: Clipping | None = None
    _batches_per_update = 1
    _total: Tensor | None = None  # of the packets since the last update
    _batches_in_total: Tensor | None = None

    def _begin_renorm(
        self, clipping: Mapping[str, float] | None, renorm_momentum: float, momentum: float | None, zero_debias: bool
    ) -> None:
        bounds = bounds_of(clipping)
        if self.running_mean is None or momentum is None or zero_debias:
            raise ValueError(
                "renorm needs running statistics that are averaged with a momentum. Received: "
                f"track_running_stats={self.track_running_stats}, momentum={momentum}, zero_debias={zero_debias}"
            )
        if not 0 <= renorm_momentum <= 1:
            raise ValueError(f"expected renorm_momentum to be between 0 and 1. Received: {renorm_momentum}")
        self.renorm, self.renorm_clipping, self.renorm_momentum = True, clipping and dict(clipping), renorm_momentum
        self._renorm = bounds
        for name in RENORM_BUFFERS:
            self.register_buffer(name, torch.empty_like(self.running_mean))
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Resets the running statistics, and those of batch renormalization: means to 0, variance and deviations to 1."""
        super().reset_running_stats()
        if self._renorm is not None:
            self.get_buffer("renorm_mean").zero_()
            self.get_buffer("running_stddev").fill_(1)
            self.get_buffer("renorm_stddev").fill_(1)

    def _renorm_statistics(self) -> Statistics:
        return Statistics(*(self.get_buffer(name) for name in ("running_mean", "running_var", *RENORM_BUFFERS)))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalises ``input``; see the class for shapes, ``sync_batch_norm`` for errors."""
        if torch.jit.is_scripting():
            if self.training:
                raise RuntimeError(
                    "hvd-syncbn does not synchronize in TorchScript: call `.eval()` on the compiled model, "
                    "or `hvd_syncbn.torch.revert_sync_batchnorm` before compiling one that trains"
                )
            self._check_input_dim(input)
            return self._normalize_locally(input, residual, self._fused)
        activation = self._fused
        residual = check_input(input, self.num_features, residual, activation)
        if not _is_proxy(input):
            self._check_input_dim(input)
        if not self.training:
            if getattr(self, "_frozen_in_training", False):
                return self._forward_frozen(input, residual)
            return self._normalize_locally(input, residual, activation)
        if self._renorm is not None:
            y, packet = renormalize(
                input,
                self.weight,
                self.bias,
                self.get_buffer("renorm_mean"),
                self.get_buffer("renorm_stddev"),
                self._renorm,
                self.eps,
                residual,
                activation,
                self.process_set,
                self.collective_name,
            )
            with torch.no_grad():
                self._take_statistics(packet)
            return y
        total = self._total
        running = self._running() if total is None else WITHOUT_STATISTICS
        y = normalize(
            input,
            self.weight,
            self.bias,
            running,
            self.eps,
            residual,
            activation,
            self.process_set,
            self.collective_name,
            total,
        )
        if total is not None:
            self._count_batch(total)
        return y

    def _accumulate(self, batches: int) -> None:
        """Update the running statistics once in ``batches`` training steps; see ``accumulate_statistics``."""
        for name in ACCUMULATION:
            vars(self).pop(name, None)
        if batches > 1:
            assert self.running_mean is not None
            self._batches_per_update = batches
            device = self.running_mean.device
            self._total = torch.zeros(native.packet_size(self.num_features), dtype=torch.int64, device=device)
            self._batches_in_total = torch.zeros((), dtype=torch.int64, device=device)

    def _take_statistics(self, packet: Tensor) -> None:
        """Take the reduced packet of a batch into the running statistics, as a training step does."""
        if self._total is None:
            self._update_statistics(packet, 1)
        else:
            self._total.add_(packet)
            self._count_batch(self._total)

    def _count_batch(self, total: Tensor) -> None:
        """Update the running statistics by the total if it is complete, without a branch, which would end a compiled graph."""
        count = self._batches_in_total
        assert count is not None
        count.add_(1)
        is_complete = count == self._batches_per_update
        packet = total * is_complete  # an empty batch's before: it changes nothing
        packet[native.DIGEST] = 0  # micro-batches with and without gradients differ in it
        total.masked_fill_(is_complete, 0)
        count.masked_fill_(is_complete, 0)
        self._update_statistics(packet, is_complete)

    def _update_statistics(self, packet: Tensor, batches: Tensor | int) -> None:
        """Update the running statistics by a reduced packet, and count the batches."""
        running = self._running()
        if self._renorm is not None:
            statistics = self._renorm_statistics()
            update_statistics(packet, statistics, running, self.renorm_momentum, self.eps, self.collective_name)
        else:
            x = torch.empty(0, self.num_features, device=packet.device)  # no values of this rank
            forward_apply(x, packet, None, None, None, *running, self.eps, False, self.collective_name)
        if running.batches is not None:
            running.batches.add_(batches)

    def _running(self) -> Running:
        if not self.track_running_stats:
            return WITHOUT_STATISTICS
        buffers = self._buffers  # a third of the time of nn.Module's attributes, in every training step
        mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        momentum = self.momentum
        if momentum is None:
            return Running(mean, var, batches, 1.0, None, True, self.skip_nonfinite)
        new_weight = None if self.zero_debias else momentum
        return Running(mean, var, batches, 1 - momentum, new_weight, True, self.skip_nonfinite)

    def _forward_frozen(self, input: Tensor, residual: Tensor | None) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        learns = self._frozen_affine
        weight, bias = (p if p is None or learns else p.detach() for p in (self.weight, self.bias))
        return frozen_batch_norm(input, self.running_mean, self.running_var, weight, bias, self.eps, residual, self._fused)

    def extra_repr(self) -> str:
        """The arguments of ``nn.BatchNorm``, the activation, the average, batch renormalization, and the process set."""
        text = super().extra_repr() + (", zero_debias=True" if self.zero_debias else "")
        text += "" if self.skip_nonfinite else ", skip_nonfinite=False"
        if self._renorm is not None:
            text += "".join(f", {name}={getattr(self, name)}" for name in RENORM)
        return text if self.process_set is None else f"{text}, process_set={self.process_set}"

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None, *, process_set: Any = None) -> nn.Module:
        """``hvd_syncbn.torch.convert_sync_batchnorm``, where ``torch.nn.SyncBatchNorm`` has it, with its argument's name."""
        from hvd_syncbn.torch_impl.convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_set if process_group is None else process_group)


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """``SyncBatchNorm`` that is an ``nn.BatchNorm1d``, and takes its inputs: what conversion makes of one."""

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """``SyncBatchNorm`` that is an ``nn.BatchNorm2d``, and takes its inputs: what conversion makes of one."""

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """``SyncBatchNorm`` that is an ``nn.BatchNorm3d``, and takes its inputs: what conversion makes of one."""

    _check_input_dim = nn.BatchNorm3d._check_input_dim
