"""Accuracy and time of `recalibrate` and of other tools that recompute stored statistics, in PyTorch, also on uneven ranks.

    python -m benchmarks.recalibration
    horovodrun -np 2 -H localhost:2 python -m benchmarks.recalibration

Every method starts from the same network with stale statistics. The error of a layer is the distance of mean and standard
deviation from the exact ones (those of its inputs in the recalibrated network, float64, all data in one process), in standard
deviations; the table has the largest over layers and channels. fvcore's estimators are implemented from their description: in
training mode, the statistics of all batches are averaged ("naive") or combined to those of the population.
"""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn as swa_update_bn

from hvd_syncbn.torch import SyncBatchNorm, recalibrate, revert_sync_batchnorm

SAMPLES, BATCH, CHANNELS, DEPTH = 256, 8, 16, 5
Statistics = list[tuple[Tensor, Tensor]]


def network() -> nn.Sequential:
    """Return blocks of convolution, norm and relu with stale statistics (0 and 1)."""
    torch.manual_seed(0)
    blocks = (
        m
        for i in range(DEPTH)
        for m in (nn.Conv2d(CHANNELS if i else 3, CHANNELS, 3, padding=1), SyncBatchNorm(CHANNELS), nn.ReLU())
    )
    return nn.Sequential(*blocks)


def norms_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def statistics(model: nn.Module) -> Statistics:
    return [(m.running_mean.double(), m.running_var.double().sqrt()) for m in norms_of(model)]


def error(found: Statistics, exact: Statistics) -> float:
    return max(float((torch.hypot(m - em, s - es) / es).max()) for (m, s), (em, es) in zip(found, exact, strict=True))


def update_bn(model: nn.Sequential, batches: Sequence[Tensor]) -> nn.Module:
    """Run `torch.optim.swa_utils.update_bn` on this rank's shard only."""
    model = revert_sync_batchnorm(model)
    swa_update_bn(batches, model)
    return model


def precise(model: nn.Sequential, batches: Sequence[Tensor], population: bool) -> nn.Module:
    """Run fvcore's estimator on this rank's shard only."""
    model = revert_sync_batchnorm(model).train()
    norms = norms_of(model)
    sums: list[list[Any]] = [[torch.zeros(CHANNELS), torch.zeros(CHANNELS), 0] for _ in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        for x in batches:
            model(x)
            for norm, total in zip(norms, sums, strict=True):
                n = x.shape[0] * x.shape[2] * x.shape[3] if population else 1
                square = norm.running_var * (n - 1) / n + norm.running_mean**2 if population else norm.running_var
                total[0] += n * norm.running_mean
                total[1] += n * square
                total[2] += n
    for norm, (mean, square, n) in zip(norms, sums, strict=True):
        norm.running_mean = mean / n
        norm.running_var = square / n - norm.running_mean**2 * population
    return model


def ways() -> dict[str, Callable[[nn.Sequential, Sequence[Tensor]], nn.Module]]:
    return {
        "recalibrate": lambda m, b: recalibrate(m, b, progress=False),
        "recalibrate, layer by layer": lambda m, b: recalibrate(m, b, layer_by_layer=True, progress=False),
        'recalibrate, "pooled"': lambda m, b: recalibrate(m, b, estimator="pooled", progress=False),
        "swa_utils.update_bn, every rank its own": update_bn,
        "fvcore, naive, every rank its own": lambda m, b: precise(m, b, False),
        "fvcore, population, every rank its own": lambda m, b: precise(m, b, True),
    }


def main() -> None:
    """Print the table."""
    hvd.init(process_sets="dynamic")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    same = torch.Generator().manual_seed(1)  # the same on every rank
    data = torch.randn(SAMPLES, 3, 16, 16, generator=same) * torch.rand(SAMPLES, 1, 1, 1, generator=same) * 4 + 2
    # The first rank has a quarter of an even share; the last batch of a shard is shorter.
    first = SAMPLES // hvd.size() // 4 if hvd.size() > 1 else SAMPLES
    rest = SAMPLES - first
    cuts = [0, *(first + rest * r // max(hvd.size() - 1, 1) for r in range(hvd.size()))]
    mine = data[cuts[hvd.rank()] : cuts[hvd.rank() + 1]].split(BATCH - 1)
    alone = hvd.add_process_set([0]) if hvd.size() > 1 else None
    exact: Statistics = []
    if hvd.rank() == 0:
        options = {} if alone is None else {"process_set": alone}
        whole = recalibrate(network().double(), data.double().split(BATCH), layer_by_layer=True, progress=False, **options)
        exact = statistics(whole)
    exact = hvd.broadcast_object(exact, 0)
    table = Table(
        title=f"{DEPTH} blocks, {SAMPLES} images, {hvd.size()} ranks with {[b - a for a, b in itertools.pairwise(cuts)]}"
    )
    for column in ("", "largest error, in std, worst rank", "ranks agree", "seconds"):
        table.add_column(column)
    for name, way in ways().items():
        start = time.perf_counter()
        model = way(copy.deepcopy(network()), mine)
        seconds = time.perf_counter() - start
        found = statistics(model)
        everyone = hvd.allgather_object((error(found, exact), seconds, [t.numpy().tobytes() for pair in found for t in pair]))
        agree = all(e[2] == everyone[0][2] for e in everyone)
        table.add_row(
            name, f"{max(e[0] for e in everyone):.2g}", "yes" if agree else "no", f"{max(e[1] for e in everyone):.2f}"
        )
    if hvd.rank() == 0:
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
