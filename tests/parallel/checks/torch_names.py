"""Names of PyTorch layers' collectives, in a job with a timeline; see test_names.py."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from hvd_syncbn.torch import SyncBatchNorm, convert_sync_batchnorm
from tests.torch_tools import assert_same, randn, step

STEPS = 5


class Generator(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.main(x)
        return y


class Discriminator(Generator):
    pass


def train(models: Sequence[nn.Module]) -> list[str]:
    """Train them in turns; the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            for model in models:
                model(randn(hvd.rank(), 4, 3)).square().sum().backward()
    return [str(warning.message) for warning in caught]


def check_models_that_are_converted_one_by_one() -> None:
    assert train([convert_sync_batchnorm(Generator(4)), convert_sync_batchnorm(Discriminator(8))]) == []


def check_models_of_one_class() -> list[str]:
    """Alike but for their widths: right, slow, and warned of."""
    return train([convert_sync_batchnorm(nn.Sequential(nn.Linear(3, n), nn.BatchNorm1d(n))) for n in (4, 8)])


def check_models_of_one_class_converted_together() -> None:
    models = nn.ModuleDict({"left": Generator(4), "right": Generator(8)})
    assert train(list(convert_sync_batchnorm(models).values())) == []


def check_a_rank_that_has_made_more() -> None:
    """Rank 0 has converted other models, and has its own from a file: as where a new worker joins old ones."""
    torch.manual_seed(0)
    model = Generator(4)
    if hvd.rank() == 0:
        for width in (4, 8):
            convert_sync_batchnorm(Generator(width))
        model = pickle.loads(pickle.dumps(convert_sync_batchnorm(model)))
    else:
        convert_sync_batchnorm(model)
    layer = model.main[1]
    assert isinstance(layer, SyncBatchNorm)
    x, dy = randn(7, 4 * hvd.size(), 4), randn(8, 4 * hvd.size(), 4)
    mine = slice(4 * hvd.rank(), 4 * hvd.rank() + 4)
    got = step(layer, x[mine], dy[mine])
    parts = hvd.allgather_object({name: got[name] for name in ("y", "dx", "running_mean", "running_var")})
    for name in ("running_mean", "running_var"):
        assert_same(parts[0][name], parts[1][name])
    whole = torch.cat([part["y"] for part in parts])
    torch.testing.assert_close(whole.mean(0), torch.zeros(4), rtol=0, atol=1e-6)
