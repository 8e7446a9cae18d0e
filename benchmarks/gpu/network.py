"""A ResNet-50 step under AMP with channels last, by norm; and the host's microseconds of a call.

`python -m benchmarks.gpu.network FOLDER` writes network.json after every figure. All at size 1: this package's layer without a
collective, torch.nn.SyncBatchNorm's function with its all-gather over a process group of one rank (by itself it would run
F.batch_norm there), and nn.BatchNorm2d.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as PeerFunction

from benchmarks.gpu import size_one
from hvd_syncbn.torch import SyncBatchNorm, convert_sync_batchnorm

BATCH = 128
IMAGE = 224
STEPS = 12
WARM_UP = 4
CALLS = 500
CALL_SHAPE = (2, 64, 8, 8)


class Peer(nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm that synchronizes at size 1, too."""

    def forward(self, input: Tensor) -> Tensor:
        """Run the function that several ranks run."""
        group = torch.distributed.group.WORLD
        statistics_ = (self.running_mean, self.running_var, self.eps, self.momentum)
        result: Tensor = PeerFunction.apply(input, self.weight, self.bias, *statistics_, group, 1)
        return result


class Bottleneck(nn.Module):
    """A residual block."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """Add the body's output to the shortcut's."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> nn.Sequential:
    """A ResNet-50 by default."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    before = width
    for number, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(before, width << number, 2 if block == 0 and number > 0 else 1))
            before = 4 * (width << number)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))


def with_peers(model: nn.Module) -> nn.Module:
    """The model with torch.nn.SyncBatchNorm in place of its batch norms."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, Peer(child.num_features, child.eps, child.momentum))
        else:
            with_peers(child)
    return model


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nn.BatchNorm2d": lambda model: model,
    "ours": convert_sync_batchnorm,
    "torch SyncBatchNorm": with_peers,
}


def step_ms(model: nn.Module) -> tuple[float, float]:
    """Median milliseconds of a training step on the GPU, and the last loss."""
    model = model.cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x = torch.randn(BATCH, 3, IMAGE, IMAGE, device="cuda").contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 1000, (BATCH,), device="cuda")
    times = []
    for _ in range(WARM_UP + STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARM_UP:]), loss.item()


def call_us(layer: nn.Module) -> dict[str, float]:
    """Median microseconds of the host for a call, forward and backward, while the GPU keeps up."""
    x = torch.randn(CALL_SHAPE, device="cuda", requires_grad=True)
    dy = torch.randn(CALL_SHAPE, device="cuda")
    forward, backward = [], []
    for i in range(WARM_UP + CALLS):
        start = time.perf_counter()
        y = layer(x)
        between = time.perf_counter()
        y.backward(dy)
        end = time.perf_counter()
        if i % 20 == 0:
            torch.cuda.synchronize()
        forward.append(1e6 * (between - start))
        backward.append(1e6 * (end - between))
    return {"forward": statistics.median(forward[WARM_UP:]), "backward": statistics.median(backward[WARM_UP:])}


def summary(found: dict[str, Any]) -> str:
    """One sentence about the figures so far."""
    steps = ", ".join(f"{name} {ms['ms']:.1f}" for name, ms in found["step"].items())
    calls = ", ".join(f"{name} {us['forward']:.0f} and {us['backward']:.0f}" for name, us in found["calls"].items())
    return f"ResNet-50 step in ms: {steps or 'none'}; host's us of a call: {calls or 'none'}"


def main() -> None:
    """Measure everything, and write the figures after each."""
    sys.modules.update(size_one.modules())
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {"about": {"batch": BATCH, "image": IMAGE, "call": CALL_SHAPE}, "step": {}, "calls": {}}

    def write() -> None:
        found["summary"] = summary(found)
        (folder / ".network.json").write_text(json.dumps(found, indent=1) + "\n")
        (folder / ".network.json").replace(folder / "network.json")
        print(found["summary"], flush=True)

    layers = {"ours": SyncBatchNorm, "nn.BatchNorm2d": nn.BatchNorm2d, "torch SyncBatchNorm": Peer}
    for name, make in layers.items():
        found["calls"][name] = call_us(make(CALL_SHAPE[1]).cuda())
        write()
    for name, convert in NORMS.items():
        torch.manual_seed(0)
        ms, loss = step_ms(convert(resnet()))
        found["step"][name] = {"ms": ms, "loss": loss}
        write()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
