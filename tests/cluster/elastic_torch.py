"""One worker of an elastic PyTorch job, in which workers die as `plan.json` in the job's folder says; see elastic.py.

What it computes up to the second layer is exact, and depends on the global batch alone: both layers' running statistics, at the
end, have to be those of one process that was given the same global batches (`replay`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hvd_syncbn.torch import SyncBatchNorm
from tests.torch_tools import randn

SAMPLES, BATCH = 512, 2
WORKER = f"{os.environ.get('HOROVOD_HOSTNAME')}:{os.environ.get('HOROVOD_ELASTIC_SLOT')}"


class Fault(nn.Module):
    """The identity, in which this worker dies where the plan says so."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.plan: list[dict[str, Any]] = json.loads((folder / "plan.json").read_text())
        self.step = -1

    def here(self, where: str) -> None:
        """Die, if it is time: once in a job for every entry of the plan."""
        for number, death in enumerate(self.plan):
            now = death["step"] == self.step if death["step"] >= 0 else (self.folder / "now").exists()
            if now and death["where"] == where and death["worker"] in (WORKER, f"rank {hvd.rank()}"):
                try:
                    (self.folder / f"died{number}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                log(self.folder, event="dies", number=number)
                if death["how"] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("an error in the user's code")

    def forward(self, x: Tensor) -> Tensor:
        self.here("forward")
        if x.requires_grad:
            x.register_hook(lambda _: self.here("backward"))
        return x


def log(folder: Path, **entry: Any) -> None:
    """Add a line to this process's log; in the file even if the next thing is its death."""
    with (folder / f"{WORKER}-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps({"worker": WORKER, "pid": os.getpid(), "time": time.time(), **entry}) + "\n")


def layers(fault: nn.Module) -> nn.Sequential:
    """Two synchronized layers, between which a worker can die; what is trained comes after them."""
    torch.manual_seed(0)
    return nn.Sequential(
        SyncBatchNorm(3, affine=False), nn.ReLU(), fault, SyncBatchNorm(3, affine=False), nn.Flatten(), nn.Linear(12, 2)
    )


def data() -> Tensor:
    """All samples, [n, 3, 4]."""
    return randn(1, SAMPLES, 3, 4) * 3 + 5


def statistics(model: nn.Sequential) -> list[str]:
    """Running statistics and batch counters, as bytes."""
    return [buffer.numpy().tobytes().hex() for buffer in model.buffers()]


def replay(batches: Sequence[Sequence[int]]) -> list[str]:
    """What one process has at the end that is given these global batches (indices of samples)."""
    hvd.init()
    model, samples = layers(nn.Identity()), data()
    for batch in batches:
        model(samples[list(batch)])
    hvd.shutdown()
    return statistics(model)


def main() -> None:
    """The worker."""
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    hvd.init()
    fault = Fault(folder)
    model = layers(fault)
    # A constant learning rate: averaging by Horovod leaves it right for any number of workers.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    sampler = hvd.elastic.ElasticSampler(range(SAMPLES), seed=0)
    loader = DataLoader(TensorDataset(torch.arange(SAMPLES), data()), batch_size=BATCH, sampler=sampler)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, step=0, round=0, epoch=0, history=[])

    @hvd.elastic.run
    def train(state: Any) -> None:
        state.round += 1
        state.save()
        log(folder, event="loop", rank=hvd.rank(), size=hvd.size(), step=state.step, round=state.round)
        while state.step < steps:
            state.sampler.set_epoch(state.epoch)
            for number, (indices, x) in enumerate(loader):
                fault.step = state.step
                key = f"{state.round}, {hvd.size()}, {state.step}"
                log(folder, event="batch", key=key, samples=indices.tolist())
                x.requires_grad_()
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                fault.here("between")
                state.sampler.record_batch(number, BATCH)
                state.step += 1
                state.history = [*state.history, key]
                state.commit()
                if state.step == steps or ((folder / "now").exists() and hvd.size() == 1):
                    return
                time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
            state.epoch += 1

    train(state)
    if hvd.rank() == 0:
        (folder / "result.json").write_text(json.dumps({"history": state.history, "statistics": statistics(model)}))
    log(folder, event="end", rank=hvd.rank(), size=hvd.size(), step=state.step)


if __name__ == "__main__":
    main()
