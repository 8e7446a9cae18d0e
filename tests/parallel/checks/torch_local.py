"""What would be local to a rank without an error: tensors on meta, and norms that autograd runs again. Two ranks.

The last check ends Horovod.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any
from unittest import mock

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_syncbn.torch import SyncBatchNorm2d, convert_sync_batchnorm, freeze_batchnorm, sync_batch_norm
from tests.torch_tools import assert_same, randn, randomize, step, to_numpy
from tests.unit.test_torch_recompute import CASES, ByLambda, ByModuleFunction, Once, Recomputes

RANK, SIZE = hvd.rank(), hvd.size()
ROWS = slice(None, 5) if RANK == 0 else slice(5, None)
X, DY = randn(1, 8, 3, 5, 5)[ROWS], randn(2, 8, 3, 5, 5)[ROWS]


def converted(cls: type[Recomputes], reentrant: bool = False) -> nn.Sequential:
    layer = randomize(cls(3))
    layer.reentrant = reentrant
    return convert_sync_batchnorm(nn.Sequential(layer))


def check_parts_that_run_again() -> None:
    """They have the bytes of a layer that runs nothing again, and every rank the same statistics."""
    want = step(converted(Once), X, DY)
    names = want.keys() - {"0.running_mean", "0.running_var"}
    for cls, reentrant in CASES:
        model = converted(cls, reentrant)
        got = step(model, X, DY)
        assert_same({name: got[name] for name in names}, {name: want[name] for name in names}, f"{cls.__name__} {reentrant}")
        statistics = b"".join(to_numpy(model.state_dict()[f"0.running_{name}"]).tobytes() for name in ("mean", "var"))
        assert len(set(hvd.allgather_object(hashlib.sha256(statistics).hexdigest()))) == 1
    local = step(nn.Sequential(randomize(Once(3))), X, DY)
    assert not torch.allclose(local["dx"], want["dx"], atol=1e-3)  # and a local one does not have them


def check_refused_parts() -> None:
    for cls in (ByLambda, ByModuleFunction):
        for reentrant in (True, False):
            try:
                converted(cls, reentrant)(X.clone().requires_grad_())
            except RuntimeError as error:
                assert "layer 'Sequential.0' calls F.batch_norm inside a checkpoint" in str(error)
            else:
                raise AssertionError("no error")
    step(converted(Once), X, DY)  # no rank waits for another


def on_meta(layer: Any, name: str) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.to("meta")) if name == "weight" else layer.weight
    layer.running_mean = layer.running_mean.to("meta") if name == "running_mean" else layer.running_mean
    layer.num_batches_tracked = layer.num_batches_tracked.to("meta") if name == "counter" else layer.num_batches_tracked
    return layer if name != "layer" else layer.to("meta")


def named(layer: SyncBatchNorm2d) -> SyncBatchNorm2d:
    layer.collective_name = "layer"
    return layer


def check_meta_on_every_rank() -> None:
    """An error before anything is sent."""
    with mock.patch.object(hvd, "allreduce_async_", side_effect=AssertionError):
        for name in ("weight", "running_mean", "counter", "layer"):
            for layer in (SyncBatchNorm2d(3, momentum=None), freeze_batchnorm(SyncBatchNorm2d(3)).train()):
                if name == "counter" and not layer.training:
                    continue
                try:
                    on_meta(named(layer), name)(X)
                except ValueError as error:
                    assert "on one device. Received: input on cpu" in str(error)
                else:
                    raise AssertionError("no error")
        try:
            sync_batch_norm(X, None, None, residual=X.to("meta"))
        except ValueError as error:
            assert "residual on meta" in str(error)
        else:
            raise AssertionError("no error")
    step(named(SyncBatchNorm2d(3)), X, DY)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.norm, x, use_reentrant=False)
        return y


def check_shapes_on_one_rank() -> None:
    """A model that is wholly on meta asks no other rank."""
    if RANK == 0:
        x = X.to("meta").requires_grad_()
        Block().to("meta")(x).sum().backward()
        assert x.grad is not None and x.grad.is_meta
    step(Block(), X, DY)


def check_meta_on_one_rank() -> dict[str, Any]:
    """The error ends its process, as far as Horovod sees: hvd.shutdown runs at exit. The other rank gets Horovod's."""
    layer = named(SyncBatchNorm2d(3))
    start = time.monotonic()
    try:
        (on_meta(layer, "weight") if RANK == 1 else layer)(X)
    except ValueError as error:
        assert RANK == 1, error
        hvd.shutdown()
        return {"error": str(error)}
    except hvd.mpi_ops.HorovodInternalError as error:
        assert RANK == 0, error
        assert layer.num_batches_tracked == 0
        return {"error": str(error), "seconds": time.monotonic() - start}
    raise AssertionError("no error")
