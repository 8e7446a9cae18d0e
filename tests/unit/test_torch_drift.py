"""PyTorch's `check_ranks_agree` on one rank, and what it reads of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("horovod.torch")

import horovod.torch as hvd
import torch
from torch import nn

from hvd_syncbn import drift as core
from hvd_syncbn.torch import check_ranks_agree, convert_sync_batchnorm
from hvd_syncbn.torch_impl import drift

TENSORS: dict[str, Any] = {
    "float32": torch.ones(2, 3),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "complex": torch.ones(3, dtype=torch.complex64).conj(),
    "bool": torch.ones(3, dtype=torch.bool),
    "scalar": torch.tensor(1.0),
    "empty": torch.ones(0, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "expanded": torch.ones(1).expand(3),
    "sparse": torch.eye(3).to_sparse(),
    "csr": torch.eye(3).to_sparse_csr(),
    "meta": torch.ones(3, device="meta"),
    "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "lazy": nn.LazyLinear(3).weight,
    "requires grad": torch.ones(3, requires_grad=True),
}


@pytest.fixture(autouse=True)
def horovod() -> None:
    hvd.init()


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", TENSORS)
def test_every_tensor_has_a_digest(name: str) -> None:
    tensor = TENSORS[name]
    value = drift._value(tensor)
    assert core.digest(value) == core.digest(drift._value(tensor))
    if name == "bfloat16":
        assert value.tolist() == [1.0] * 3
    if not isinstance(value, str) and value.size > 1:
        changed = value.copy()
        changed.reshape(-1)[-1] = not changed.reshape(-1)[-1]
        assert core.digest(changed) != core.digest(value)


def test_alone() -> None:
    model = convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    optimizer = torch.optim.Adam(model.parameters())
    check_ranks_agree(model, optimizer, local=[model[1]])
    with pytest.raises(TypeError, match="Received: int"):
        check_ranks_agree(model, local=[3])  # type: ignore[list-item]


def test_everything_is_listed_once() -> None:
    model = convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.InstanceNorm1d(3)))
    model.register_buffer("table", torch.ones(2))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    entries = list(drift._entries(model, [optimizer], set()))
    kinds = [entry.kind for entry in entries]
    assert kinds == sorted(kinds, key=list(core.CAUSES).index), "what causes differences comes first"
    assert [kinds.count(kind) for kind in core.CAUSES] == [1, 1, 0, 4, 12, 3, 1]
    assert all(isinstance(entry.value, np.ndarray) for entry in entries if entry.kind == core.WEIGHT)


def test_scheduler_does_not_show_but_by_its_rate() -> None:
    """One rank with a scheduler and one without it differ when the rate does."""
    model = nn.Linear(3, 1)
    plain, scheduled = (torch.optim.SGD(model.parameters(), 0.1) for _ in range(2))
    torch.optim.lr_scheduler.StepLR(scheduled, 5)
    first, second = ([entry.value for entry in drift._entries(model, [one], set())][:2] for one in (plain, scheduled))
    assert first == second and first[0] == 0.1
