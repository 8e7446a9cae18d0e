"""Two ranks with a GPU each: `horovodrun -np 2 python -m benchmarks.gpu.two_gpus`.

The layer's bytes on every rank are compared with those of a twin on the CPU that sees the global batch: on the default and on
side streams, over process sets, and beside a rank that has joined.
"""

from __future__ import annotations

import sys

import horovod.torch as hvd
import torch
from torch import Tensor

from hvd_syncbn import native
from hvd_syncbn.torch import SyncBatchNorm
from tests.torch_tools import assert_same, randn, randomize, step

LAYERS = 8
SHAPE = (6, 16, 9, 7)
STEPS = 5
CYCLES = 20_000_000  # some 10 ms


def stack(sets: list[hvd.ProcessSet | None]) -> list[SyncBatchNorm]:
    """Layers over process sets in turn, with names that all ranks share."""
    layers = []
    for i in range(LAYERS):
        layer = randomize(SyncBatchNorm(SHAPE[1], activation="relu", process_set=sets[i % len(sets)]), i)
        layer.collective_name = f"two_gpus.{i}"
        layers.append(layer.cuda())
    return layers


def batch(number: int, rank: int) -> tuple[Tensor, Tensor]:
    """What a rank has in a step; another size on each."""
    shape = (SHAPE[0] + rank, *SHAPE[1:])
    return randn(10 * number + rank, *shape), randn(1000 + 10 * number + rank, *shape)


def expected(ranks: list[int], number: int, layer: int) -> list[dict[str, Tensor]]:
    """What each rank gets, by the C interface on the CPU: the sum of the ranks' packets, then each rank's own part."""
    twin = randomize(SyncBatchNorm(SHAPE[1], activation="relu"), layer)
    parts = [batch(number, rank) for rank in ranks]
    whole = step_alone(twin, torch.cat([x for x, _ in parts]), torch.cat([dy for _, dy in parts]))
    sizes = [len(x) for x, _ in parts]
    return [
        {"y": y, "dx": dx, "running_mean": whole["running_mean"], "running_var": whole["running_var"]}
        for y, dx in zip(whole["y"].split(sizes), whole["dx"].split(sizes), strict=True)
    ]


def step_alone(layer: SyncBatchNorm, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """One training step without the other rank."""
    layer.process_set = _alone
    return step(layer, x, dy)


_alone: hvd.ProcessSet
_mine = ("y", "dx", "running_mean", "running_var")


def compare(number: int, layers: list[SyncBatchNorm], groups: list[list[int]], stream: torch.cuda.Stream) -> None:
    """One step of every layer on a stream that is still busy."""
    rank = hvd.rank()
    x, dy = (tensor.cuda() for tensor in batch(number, rank))
    stream.wait_stream(torch.cuda.current_stream())
    results = []
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        for i, layer in enumerate(layers):
            randomize(layer, i)
            results.append(step(layer, x, dy))
    stream.synchronize()
    for i, result in enumerate(results):
        ranks = groups[i % len(groups)]
        want = expected(ranks, number, i)[ranks.index(rank)]
        assert_same({name: result[name].cpu() for name in _mine}, want, f"step {number}, layer {i}, ranks {ranks}:")


def joined() -> None:
    """Rank 0 has more batches: rank 1 joins, and its packets are zeros."""
    layers = stack([None])
    compare(STEPS, layers, [[0, 1]], torch.cuda.current_stream())
    if hvd.rank() == 0:
        for number in range(STEPS + 1, STEPS + 4):
            compare(number, layers, [[0]], torch.cuda.Stream())
    hvd.join()


def main() -> None:
    """Run on two ranks."""
    global _alone
    own = [hvd.ProcessSet([rank]) for rank in range(2)]
    hvd.init(process_sets=own)
    if hvd.size() != 2:
        sys.exit(f"expected 2 ranks. Received: {hvd.size()}")
    torch.cuda.set_device(hvd.local_rank())
    _alone = own[hvd.rank()]
    print(
        f"rank {hvd.rank()}: {torch.cuda.get_device_name()}, NCCL {hvd.nccl_built()}, kernels {native.has_cuda()}", flush=True
    )
    mixed: list[hvd.ProcessSet | None] = [None, _alone]
    for name, sets, groups in (("all ranks", mixed[:1], [[0, 1]]), ("process sets", mixed, [[0, 1], [hvd.rank()]])):
        layers = stack(sets)
        for number in range(STEPS):
            compare(number, layers, groups, torch.cuda.current_stream() if number % 2 else torch.cuda.Stream())
        print(f"rank {hvd.rank()}: equal over {name}", flush=True)
    joined()
    print(f"rank {hvd.rank()}: equal beside a joined rank", flush=True)
    hvd.shutdown()


if __name__ == "__main__":
    main()
