"""Batch renormalization in PyTorch on several ranks; see test_renorm.py."""

from __future__ import annotations

from unittest import mock

import horovod.torch as hvd
import numpy as np
import torch

from hvd_syncbn import vectors
from hvd_syncbn.torch import SyncBatchNorm, accumulate_statistics, take_part
from hvd_syncbn.torch_impl import horovod
from tests.parallel.shared import renorm
from tests.torch_tools import assert_same

RANK, SIZE = hvd.rank(), hvd.size()


def layer(activation: str | None = "relu") -> SyncBatchNorm:
    """The same on every rank."""
    made = SyncBatchNorm(
        renorm.CHANNELS,
        renorm.EPSILON,
        renorm.MOMENTUM,
        activation=activation,
        renorm=True,
        renorm_clipping=renorm.CLIPPING,
        renorm_momentum=renorm.RENORM_MOMENTUM,
    )
    made.collective_name = "renorm"
    with torch.no_grad():
        for parameter, values in zip((made.weight, made.bias), renorm.parameters(), strict=True):
            parameter.copy_(torch.from_numpy(values))
    return made


def check_digest() -> list[str]:
    """All ways of dealing out the batches, in both layouts; the test compares them over ranks and frameworks."""
    digests = []
    for split in vectors.SPLITS:
        mine = vectors.split(SIZE, split)[RANK]
        for contiguous in (False, True):
            norm, results = layer(), []
            for step in range(renorm.STEPS):
                x, dy, residual = (torch.from_numpy(a[mine]).movedim(-1, 1) for a in renorm.batch(step))
                if contiguous:
                    x, dy, residual = (t.contiguous() for t in (x, dy, residual))
                x.requires_grad_()
                y = norm(x, residual)
                y.backward(dy)
                assert x.grad is not None
                results += [t.detach().movedim(1, -1).numpy() for t in (y, x.grad)]
            parts = hvd.allgather_object((mine, results))
            digests.append(renorm.digest(parts, norm._renorm_statistics()))
    return digests


def check_parameter_gradients_are_shares() -> None:
    """The sum over the ranks is what differentiating the formula in float64 gives, to float32's rounding."""
    norm = layer(activation=None)
    mine = vectors.split(SIZE, "uneven")[RANK]
    x, dy, _ = renorm.batch(0)
    norm(torch.from_numpy(x[mine]).movedim(-1, 1)).backward(torch.from_numpy(dy[mine]).movedim(-1, 1))
    sums = [hvd.allreduce(p.grad, op=hvd.Sum, name=f"sum{i}") for i, p in enumerate((norm.weight, norm.bias))]
    x, dy = (a.astype(np.float64).reshape(-1, renorm.CHANNELS) for a in (x, dy))
    stddev = np.sqrt(x.var(0) + renorm.EPSILON)
    r, d = np.clip(stddev, 0.6, 1.4), np.clip(x.mean(0), -0.3, 0.3)  # the renorm statistics are still 0 and 1
    normalized = (x - x.mean(0)) / stddev * r + d
    np.testing.assert_allclose(sums[0], (dy * normalized).sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sums[1], dy.sum(0), rtol=1e-5, atol=1e-5)


def check_one_collective_per_direction() -> None:
    norm = layer()
    x = torch.from_numpy(renorm.batch(0)[0][vectors.split(SIZE, "even")[RANK]]).movedim(-1, 1)
    names: list[str] = []
    own = horovod.Group.sum

    def counted(self: horovod.Group, packet: torch.Tensor, name: str) -> torch.Tensor:
        names.append(name)
        return own(self, packet, name)

    with mock.patch.object(horovod.Group, "sum", counted):
        norm(x).sum().backward()
    want = [] if SIZE == 1 else ["hvd_syncbn.renorm.forward", "hvd_syncbn.renorm.backward"]
    assert names == want, names


def check_a_rank_with_nothing_and_micro_batches() -> None:
    """`take_part` and `accumulate_statistics` leave the same statistics on every rank as one step with both batches."""
    here = RANK == 0
    norm, once = accumulate_statistics(layer(), 2), layer()
    batches = [torch.from_numpy(renorm.batch(i)[0]).movedim(-1, 1) for i in (1, 2)]
    for x in batches:
        (norm(x).sum() if here else take_part(norm)).backward()
    (once(torch.cat(batches)).sum() if here else take_part(once)).backward()
    assert_same(norm._renorm_statistics(), once._renorm_statistics())
    assert norm.num_batches_tracked == once.num_batches_tracked == 1
    assert (once._renorm_statistics().renorm_mean != 0).all()
    for other in hvd.allgather_object([t.numpy() for t in once._renorm_statistics()]):
        assert_same([torch.from_numpy(a) for a in other], list(once._renorm_statistics()))


def check_compiled() -> None:
    mine = vectors.split(SIZE, "uneven")[RANK]
    eager, compiled = layer(), layer()
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for step in range(2):
        x, dy, residual = (torch.from_numpy(a[mine]).movedim(-1, 1) for a in renorm.batch(step))
        results = []
        for norm in (eager, call):
            leaf = x.clone().requires_grad_()
            y = norm(leaf, residual)
            y.backward(dy)
            results.append([y.detach(), leaf.grad])
        assert_same(*results)
    assert_same(compiled._renorm_statistics(), eager._renorm_statistics())
    assert_same([p.grad for p in compiled.parameters()], [p.grad for p in eager.parameters()])
