"""One worker of an elastic PyTorch job, in which workers die as `plan.json` in the job's folder says; see elastic.py.

What it computes up to the second layer is exact, and depends on the global batch alone: both layers' running statistics, at the
end, have to be those of one process that was given the same global batches. A third layer synchronizes inside groups of ranks,
which are made anew after every reset; rank 0's statistics have to be those of what its groups were given. Without arguments
this is that one process, with both kinds of batches on its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hvd_syncbn.torch import SyncBatchNorm, convert_sync_batchnorm, groups
from tests.cluster.death import Plan, log
from tests.torch_tools import randn

SAMPLES, BATCH = 512, 2


class Fault(nn.Module):
    """The identity, in which this worker dies where the plan says so."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, x: Tensor) -> Tensor:
        self.plan.here("forward", hvd.rank())
        if x.requires_grad:
            x.register_hook(lambda _: self.plan.here("backward", hvd.rank()))
        return x


class Network(nn.Module):
    """Two synchronized layers, between which a worker can die; what is trained comes after them. One more for a group."""

    def __init__(self, fault: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        norms = [SyncBatchNorm(3, affine=False) for _ in range(3)]
        self.trunk = nn.Sequential(norms[0], nn.ReLU(), fault, norms[1], nn.Flatten(), nn.Linear(12, 2))
        self.grouped = nn.Sequential(norms[2])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.trunk(x)
        self.grouped(x.detach())
        return y


def data() -> Tensor:
    """All samples, [n, 3, 4]."""
    return randn(1, SAMPLES, 3, 4) * 3 + 5


def statistics(model: nn.Module) -> list[str]:
    """Running statistics and batch counters, as bytes."""
    return [buffer.numpy().tobytes().hex() for buffer in model.buffers()]


def replay(batches: Sequence[Sequence[int]], grouped: Sequence[Sequence[int]]) -> list[str]:
    """What one process has at the end that is given these batches of all ranks, and of rank 0's group (indices of samples)."""
    hvd.init()
    model, samples = Network(nn.Identity()), data()
    for batch in batches:
        model.trunk(samples[list(batch)])
    for batch in grouped:
        model.grouped(samples[list(batch)])
    hvd.shutdown()
    return statistics(model)


def main() -> None:
    """The worker; without arguments, what it is compared with."""
    if len(sys.argv) == 1:
        print(json.dumps(replay(**json.load(sys.stdin))))
        return
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    hvd.init(process_sets="dynamic")
    plan = Plan(folder)
    model = Network(Fault(plan))
    # A constant learning rate: averaging by Horovod leaves it right for any number of workers.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    sampler = hvd.elastic.ElasticSampler(range(SAMPLES), seed=0)
    loader = DataLoader(TensorDataset(torch.arange(SAMPLES), data()), batch_size=BATCH, sampler=sampler)
    state = hvd.elastic.TorchState(
        model=model, optimizer=optimizer, sampler=sampler, step=0, round=0, epoch=0, history=[], groups=[]
    )

    @hvd.elastic.run
    def train(state: Any) -> None:
        state.round += 1
        state.save()
        # Of 4 ranks two pairs, of fewer each alone: sets that Horovod does not have yet.
        mine = groups(max(1, hvd.size() // 2)).mine
        convert_sync_batchnorm(model.grouped, process_set=mine)
        log(folder, event="loop", rank=hvd.rank(), size=hvd.size(), step=state.step, round=state.round)
        while state.step < steps:
            state.sampler.set_epoch(state.epoch)
            for number, (indices, x) in enumerate(loader):
                plan.step = state.step
                key = f"{state.round}, {hvd.size()}, {state.step}"
                log(folder, event="batch", key=key, rank=hvd.rank(), samples=indices.tolist())
                x.requires_grad_()
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                plan.here("between", hvd.rank())
                state.sampler.record_batch(number, BATCH)
                state.step += 1
                state.history = [*state.history, key]
                state.groups = [*state.groups, mine.ranks or list(range(hvd.size()))]
                state.commit()
                if state.step == steps or ((folder / "now").exists() and hvd.size() == 1):
                    return
                time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
            state.epoch += 1

    train(state)
    if hvd.rank() == 0:
        result = {"history": state.history, "groups": state.groups, "statistics": statistics(model)}
        (folder / "result.json").write_text(json.dumps(result))
    log(folder, event="end", rank=hvd.rank(), size=hvd.size(), step=state.step)


if __name__ == "__main__":
    main()
