"""The contestants in PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from benchmarks.jobs import first_address, free_ports
from benchmarks.measure import EPS, SETS, Step, timed
from hvd_syncbn.cli.networks import EXPANSION, STEM, Block, resnet
from hvd_syncbn.torch import SyncBatchNorm


class Local(_BatchNorm):
    """`F.batch_norm`."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass


class _Written(Local):
    """A simple synchronized batch norm: framework ops, an allreduce of floats, autograd through both."""

    over_distributed = False

    def moments(self, x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def all_sums(self, *parts: Tensor | int) -> tuple[Tensor, ...]:
        vectors = [part if isinstance(part, Tensor) else torch.tensor([float(part)]) for part in parts]
        whole = torch.cat(vectors)
        summed: Tensor = all_reduce(whole) if self.over_distributed else hvd.allreduce(whole, op=hvd.Sum)
        return summed.split([vector.numel() for vector in vectors])

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.moments(x, [0, *range(2, x.dim())])
        with torch.no_grad():
            for old, new in ((self.running_mean, mean), (self.running_var, var)):
                assert old is not None
                old.lerp_(new, 0.1)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)


class OneRound(_Written):
    """Sum, sum of squares and count in one allreduce."""

    def moments(self, x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
        total, squares, count = self.all_sums(x.sum(axes), (x * x).sum(axes), x.numel() // x.shape[1])
        mean = total / count
        return mean, squares / count - mean * mean


class TwoRounds(_Written):
    """Sum and count in one allreduce, the squares around the mean in a second."""

    def moments(self, x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
        total, count = self.all_sums(x.sum(axes), x.numel() // x.shape[1])
        mean = total / count
        centered = x - mean.view([1, -1, *[1] * (x.dim() - 2)])
        (squares,) = self.all_sums((centered * centered).sum(axes))
        return mean, squares / count


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, block: Block, layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        width, wide = block.channels, EXPANSION * block.channels
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), layer(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, block.stride, 1, bias=False), layer(width), nn.ReLU(),
            nn.Conv2d(width, wide, 1, bias=False), layer(wide),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if block.project:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, wide, 1, block.stride, bias=False), layer(wide))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50(layer: Callable[[int], nn.Module]) -> nn.Module:
    """Return a ResNet-50 without its classifier."""
    torch.manual_seed(0)
    modules = [nn.Conv2d(3, STEM, 7, 2, 3, bias=False), layer(STEM), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = STEM
    for block in resnet():
        modules.append(_Bottleneck(channels, block, layer))
        channels = EXPANSION * block.channels
    return nn.Sequential(*modules)


class Torch:
    """See `measure.Framework`."""

    local: tuple[str, ...] = ("local", "ours")
    synchronized: tuple[str, ...] = ("ours alone", "ours", "local", "one round", "two rounds", "horovod")
    engines: tuple[str, ...] = ("horovod", "torch.distributed")
    layout = "channels first"
    depth = 20

    def __init__(self, ranks: int, threads: int, ports: list[int], sets: bool) -> None:
        """Initialize Horovod, with `sets` also the process sets SETS; `ports` are only used by TensorFlow's strategy."""
        self.threads = threads
        torch.set_num_threads(threads)
        alone = [hvd.ProcessSet([rank]) for rank in range(ranks)] if ranks > 1 else []  # every rank must register every set
        pairs = [hvd.ProcessSet(pair) for pair in SETS] if sets else []
        hvd.init(process_sets=[*alone, *pairs])
        self.rank = hvd.rank()
        self._alone = alone[self.rank] if alone else None
        self._pair = next((pair for pair in pairs if pair.included()), None)
        if ranks > 1:
            address = hvd.broadcast_object(f"tcp://{first_address()}:{free_ports(1)[0]}")
            dist.init_process_group("gloo", init_method=address, rank=self.rank, world_size=ranks)
        self._token = torch.zeros(1)
        self._layers = 0

    def barrier(self) -> None:
        if hvd.size() > 1:
            hvd.allreduce_(self._token, name="barrier", op=hvd.Sum)

    def shutdown(self) -> None:
        hvd.shutdown()

    def layer(self, name: str, channels: int) -> nn.Module:
        """A contestant's layer."""
        if name in ("ours", "ours alone"):
            layer = SyncBatchNorm(channels, EPS, process_set=self._alone if name == "ours alone" else None)
            self._layers += 1
            layer.collective_name = f"{name}.{self._layers}"
            return layer
        kinds = {"local": Local, "one round": OneRound, "two rounds": TwoRounds, "horovod": hvd.SyncBatchNorm}
        return kinds[name](channels, EPS)

    def step(self, name: str, shape: tuple[int, ...], layout: str, dtype: str) -> Step:
        generator = torch.Generator().manual_seed(0)
        x, dy = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
        if layout == "channels last" and len(shape) == 4:
            x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        return _step(self.layer(name, shape[1]), x.requires_grad_(), dy)

    def chain(self, name: str, shape: tuple[int, ...]) -> Step:
        x, dy = (torch.randn(shape) for _ in range(2))
        return _step(nn.Sequential(*(self.layer(name, shape[1]) for _ in range(self.depth))), x.requires_grad_(), dy)

    def allreduce(self, words: int, engine: str = "horovod") -> Step:
        packet = torch.zeros(words, dtype=torch.int64)
        if engine == "torch.distributed":
            group = dist.group.WORLD
            assert group is not None
            bare = timed(lambda: group.allreduce([packet]).wait())
            return lambda: bare() + bare()
        once = timed(lambda: hvd.allreduce_(packet, name=f"hvd_syncbn.bare.{words}", op=hvd.Sum))
        return lambda: once() + once()

    def set_allreduce(self, words: int) -> Step:
        packet = torch.zeros(words, dtype=torch.int64)
        once = timed(lambda: hvd.allreduce_(packet, name=f"hvd_syncbn.set.{words}", op=hvd.Sum, process_set=self._pair))
        return lambda: once() + once()

    def network(self, name: str, images: int, size: int) -> Step:
        model = resnet50(lambda channels: self.layer(name, channels))
        x = torch.randn(images, 3, size, size)
        dy = torch.randn_like(model(x))
        return _step(model, x, dy)

    def ddp(self, name: str, images: int, size: int) -> Step:
        def layer(channels: int) -> nn.Module:
            made: Any = self.layer(name, channels)
            made.process_set, made.over_distributed = dist.group.WORLD, True
            return made

        model = DistributedDataParallel(resnet50(layer), broadcast_buffers=False)
        x = torch.randn(images, 3, size, size)
        dy = torch.randn_like(model(x))
        return _step(model, x, dy)

    def normalize(
        self, name: str, x: NDArray[np.float32], gamma: NDArray[np.float32], beta: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        layer: Any = self.layer(name, x.shape[1])
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(gamma))
            layer.bias.copy_(torch.from_numpy(beta))
            y: NDArray[np.float32] = layer(torch.from_numpy(x)).numpy()
        return y

    def training(self, name: str, images: int, size: int) -> Step:
        model = resnet50(lambda channels: self.layer(name, channels))
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 1e-9), model.named_parameters(name))
        x = torch.randn(images, 3, size, size)
        dy = torch.randn_like(model(x))

        def train() -> None:
            optimizer.zero_grad()
            model(x).backward(dy)
            optimizer.step()

        return timed(train)

    def saved(self, name: str, shape: tuple[int, ...], relu: bool) -> dict[str, int]:
        layer: Any = self.layer(name, shape[1])
        if relu and name == "ours":
            layer.activation = "relu"
        elif relu:
            layer = nn.Sequential(layer, nn.ReLU())
        x = torch.randn(shape, requires_grad=True)
        storages = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        found = {"input": storages.pop(x.data_ptr(), 0), "output": storages.pop(y.data_ptr(), 0)}
        large = [size for size in storages.values() if size >= x.nbytes]
        return found | {"other tensors of its size": sum(large), "small ones": sum(storages.values()) - sum(large)}


def _step(model: nn.Module, x: Tensor, dy: Tensor) -> Step:
    def step() -> tuple[float, float]:
        x.grad = None
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        y = model(x)
        middle = time.perf_counter()
        y.backward(dy)
        return middle - start, time.perf_counter() - middle

    return step
