"""`check_ranks_agree` of PyTorch: what makes ranks differ, one after the other, on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_syncbn.torch import check_ranks_agree, convert_sync_batchnorm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2, dtype=torch.float32)]
    model = convert_sync_batchnorm(nn.Sequential(*layers))
    model.register_buffer("table", torch.arange(4.0))
    return model


def trained(**options: Any) -> tuple[nn.Sequential, Any, torch.optim.lr_scheduler.ReduceLROnPlateau]:
    """Two steps by each rank's own data."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.1, **options)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    generator = torch.Generator().manual_seed(hvd.rank())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 3, 3, generator=generator)).square().sum().backward()
        optimizer.step()
    return model, optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)


def said(*args: Any, **options: Any) -> str:
    """The error, the same on every rank."""
    with pytest.raises(RuntimeError) as caught:
        check_ranks_agree(*args, **options)
    errors = hvd.allgather_object(str(caught.value))
    assert errors == errors[:1] * hvd.size()
    return errors[0]


def check_a_training_that_is_right() -> None:
    for options in ({}, {"amsgrad": True}, {"lr": torch.tensor(0.1)}):
        model, optimizer, _ = trained(**options) if "lr" not in options else trained()
        check_ranks_agree(model, optimizer)
        check_ranks_agree(model)
        model.to(memory_format=torch.channels_last)
        check_ranks_agree(model.half(), [optimizer])
        check_ranks_agree(model.to(torch.bfloat16))


def check_scheduler_by_a_local_loss() -> None:
    model, optimizer, scheduler = trained()
    for loss in (1.0, 1.0 + hvd.rank() - 0.5):  # better on rank 0, worse on rank 1
        scheduler.step(loss)
    assert len(set(hvd.allgather_object(optimizer.param_groups[0]["lr"]))) == 2
    error = said(model, optimizer)
    assert "learning rate 'Adam.param_groups[0]' is not the same on all of them. Received: 0.1 on rank 0; 0.01" in error, error
    assert "Average the metric first" in error


def check_each_kind() -> None:
    """The first thing that differs is named."""
    mine = float(hvd.rank())

    def kernel(model: Any, optimizer: Any) -> None:
        model[4].weight[1, 2] += mine

    def one_bit(model: Any, optimizer: Any) -> None:
        model[0].weight.view(torch.int32)[0, 0, 0, 0] ^= hvd.rank()

    def moment(model: Any, optimizer: Any) -> None:
        optimizer.state[model[0].bias]["exp_avg_sq"] += mine

    def steps(model: Any, optimizer: Any) -> None:
        optimizer.state[model[0].bias]["step"] += mine

    def statistics(model: Any, optimizer: Any) -> None:
        model[1].running_var[3] += mine

    def buffer(model: Any, optimizer: Any) -> None:
        model.table += mine

    def weight_decay(model: Any, optimizer: Any) -> None:
        optimizer.param_groups[0]["weight_decay"] = mine

    def missing(model: Any, optimizer: Any) -> None:
        if hvd.rank() == 1:
            del optimizer.state[model[0].bias]

    cases: list[tuple[Callable[[Any, Any], None], str]] = [
        (kernel, "weight '4.weight' is not the same on all of them. Received: rank 1 differs from rank 0 by up to 1,"),
        (one_bit, "weight '0.weight' is not the same on all of them. Received: rank 1 differs from rank 0 by up to "),
        (moment, "optimizer state 'Adam 0.bias.exp_avg_sq' is"),
        (steps, "optimizer state 'Adam 0.bias.step' is not the same on all of them. Received: 2.0 on rank 0; 3.0 on rank 1."),
        (statistics, "running statistics '1.running_var' is"),
        (buffer, "buffer 'table' is"),
        (weight_decay, "hyperparameters 'Adam.param_groups[0]' is"),
        (missing, "different numbers of values. Received: by rank, optimizer state: [18, 15]."),
    ]
    for change, expected in cases:
        model, optimizer, _ = trained()
        check_ranks_agree(model, optimizer)
        with torch.no_grad():
            change(model, optimizer)
        error = said(model, optimizer)
        assert expected in error, error


def check_what_is_each_ranks_own() -> None:
    """Local norms and what `local` holds; but a plain optimizer's weights are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    head = model[2]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model[:2].parameters(), 0.1), model[:2].named_parameters())
    own = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9)
    loss = model(torch.randn(4, 3, generator=torch.Generator().manual_seed(hvd.rank()))).square().sum()
    loss.backward()
    optimizer.step()
    own.step()
    assert len(set(hvd.allgather_object(model[1].running_mean.tolist().__repr__()))) == 2
    check_ranks_agree(model, [optimizer, own], local=[head])
    check_ranks_agree(model, [optimizer, own], local=list(head.parameters()))
    assert "weight '2.weight' (and 3 more values) is" in said(model, [optimizer, own])
    with pytest.raises(TypeError, match=r"in `local`. Received: str"):
        check_ranks_agree(model, local=["head"])
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module. Received: list"):
        check_ranks_agree([])
    with pytest.raises(TypeError, match=r"a list of them. Received: str"):
        check_ranks_agree(model, ["sgd"])


def check_process_sets() -> None:
    """Each set of ranks agrees inside, in norms, weights and optimizer."""
    mine = [hvd.add_process_set([rank]) for rank in range(hvd.size())][hvd.rank()]
    model = convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), mine)
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[0].bias.fill_(0.5)
    model(torch.randn(4, 3, generator=torch.Generator().manual_seed(hvd.rank())))
    check_ranks_agree(model)  # only the statistics differ
    optimizer = torch.optim.SGD(model.parameters(), 0.1 * (1 + hvd.rank()))
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), process_set=mine)
    with torch.no_grad():
        model[0].weight += hvd.rank()
    check_ranks_agree(model, optimizer)
    check_ranks_agree(model, process_set=mine)
    assert "weight '0.weight' is" in said(model)
