"""PyTorch layers in processes forked from a rank; on one rank as before, on several an error."""

from __future__ import annotations

import warnings

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hvd_syncbn.torch import SyncBatchNorm, convert_sync_batchnorm, groups, recalibrate, sync_batch_norm
from tests.parallel.shared.forks import assert_refused, in_fork
from tests.torch_tools import randn

X = randn(1, 4, 3, 5)
ALONE = [hvd.add_process_set([rank]) for rank in range(hvd.size())][hvd.rank()] if hvd.size() > 1 else None


def model() -> nn.Module:
    return convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))


class Transformed(Dataset[Tensor]):
    """Samples that a network prepares."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return self.net(X).detach()


def check_a_data_loader() -> None:
    net = model()
    if hvd.size() > 1:
        loader = DataLoader(Transformed(net), num_workers=1, timeout=60)
        with pytest.raises(RuntimeError, match=r"forked after `hvd\.init\(\)`.*Call `\.eval\(\)`"):
            next(iter(loader))
    net.eval()
    assert [len(batch) for batch in DataLoader(Transformed(net), num_workers=1, timeout=60)] == [1, 1]


def check_several_ranks() -> None:
    if hvd.size() == 1:
        return
    net, x = model(), X.clone().requires_grad_()
    y = net(x)
    # Autograd's own threads do not survive a fork, so each of these is in a process of its own.
    assert_refused(lambda: net(X))
    assert_refused(y.sum().backward)
    assert_refused(lambda: sync_batch_norm(X, None, None))
    assert_refused(lambda: recalibrate(net, [X]))
    assert_refused(lambda: SyncBatchNorm(3, process_set=hvd.global_process_set)(X))
    compiled = torch.compile(net, backend="aot_eager")
    compiled(X)
    assert_refused(lambda: compiled(X))
    # A fork of a fork, too.
    assert "forked after" in in_fork(lambda: in_fork(lambda: net(X)))


def check_groups() -> None:
    """Exchange messages on one rank, too."""
    assert_refused(lambda: groups(1))


def check_nothing_to_exchange() -> None:
    """One rank, or a process set of this one: as in a process that was not forked."""
    layer = SyncBatchNorm(3, process_set=ALONE)
    want = str(layer(X).detach().numpy().tobytes())
    assert in_fork(lambda: layer(X).detach().numpy().tobytes()) == want


def check_the_rank_goes_on() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model()(X)
