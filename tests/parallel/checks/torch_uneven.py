"""A whole training with ranks that have different numbers of batches, short ones, empty ones; see test_uneven.py."""

from __future__ import annotations

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import nn

from hvd_syncbn.torch import SyncBatchNorm, convert_sync_batchnorm
from tests.parallel.shared.uneven import BATCHES, part, seed
from tests.torch_tools import assert_same, randn

RANK, SIZE = hvd.rank(), hvd.size()
SINGLE = [hvd.add_process_set([rank]) for rank in range(SIZE)]


def network(process_set: object) -> nn.Module:
    """Statistics of the first layer depend on the data alone; all of it learns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    return convert_sync_batchnorm(model, process_set=process_set)


def loss(model: nn.Module, x: torch.Tensor, target: torch.Tensor, samples: int) -> torch.Tensor:
    """This rank's share of the mean over the global batch, times the ranks, as Horovod divides by them; 0 of nothing."""
    return F.cross_entropy(model(x), target, reduction="sum") * (SIZE / samples)


def check_training() -> None:
    """hvd.join() with DistributedOptimizer around: as one process that has every global batch.

    In float64, where the order of sums differs by 1e-16 of a gradient; what has no gradient in it has the same bytes.
    """
    ours, whole = network(None), network(SINGLE[RANK])
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1), named_parameters=ours.named_parameters())
    reference = torch.optim.SGD(whole.parameters(), lr=0.1)
    for number, counts in enumerate(BATCHES[SIZE]):
        samples = sum(count or 0 for count in counts)
        x, target = randn(seed(number), samples, 4, dtype=torch.float64), torch.arange(samples) % 3
        reference.zero_grad()
        (loss(whole, x, target, samples) / SIZE).backward()
        reference.step()
        if counts[RANK] is None:
            continue
        mine = part(counts, RANK)
        optimizer.zero_grad()
        mine_x = x[mine].requires_grad_()
        loss(ours, mine_x, target[mine], samples).backward()
        assert mine_x.grad is not None and mine_x.grad.shape == mine_x.shape
        optimizer.step()
    last = hvd.join()
    assert BATCHES[SIZE][-1][last] is not None
    # Those who left early have the weights of that time.
    hvd.broadcast_parameters(ours.state_dict(), root_rank=last)
    assert isinstance(ours[0], SyncBatchNorm)
    assert_same([ours[0].running_mean, ours[0].running_var], [whole[0].running_mean, whole[0].running_var])
    for name, value in whole.state_dict().items():
        # Running statistics are float32, as in what was float64 before conversion.
        tolerance = 1e-6 if "running" in name else 1e-12
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=tolerance, atol=tolerance)
