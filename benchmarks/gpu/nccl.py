"""NCCL through Horovod at size 1: `python -m benchmarks.gpu.nccl 0`, or `1` with asynchronous completion of gradients.

The tensors are int64, and a side stream is still to write them when they are enqueued. By their names they are layers' packets,
which have a stream of their own and for which the host does not wait, or gradients in turns.
"""

from __future__ import annotations

import os
import sys

os.environ["HOROVOD_ENABLE_ASYNC_COMPLETION"] = sys.argv[1] if len(sys.argv) > 1 else "0"

import horovod.torch as hvd
import torch

CYCLES = 100_000_000  # some 50 ms
SIZES = (1, 140, 34_820, 278_532)  # words: of 8, 2,048 and 16,384 channels, about
ROUNDS = 20


def check(size: int, name: str) -> int:
    """Enqueue, reduce and read tensors of one size on a side stream; raises where a value is wrong.

    Returns in how many rounds Horovod returned before the stream had written the tensor.
    """
    stream = torch.cuda.Stream()
    want = torch.arange(size, dtype=torch.int64) * (2**40 + 1)
    source = want.cuda()
    torch.cuda.synchronize()
    early = 0
    for round_ in range(ROUNDS):
        with torch.cuda.stream(stream):
            tensor = torch.zeros(size, dtype=torch.int64, device="cuda")
            if round_ < 2:
                torch.cuda._sleep(CYCLES)
            tensor.copy_(source)
            if round_ % 2:
                hvd.allreduce_(tensor, name=f"{name}.{size}", op=hvd.Sum)
            else:
                hvd.synchronize(hvd.allreduce_async_(tensor, name=f"{name}.{size}", op=hvd.Sum))
            early += not stream.query()
            after = tensor + 1  # on the same stream, behind the collective
            tensor.zero_()
        stream.synchronize()
        if not torch.equal(after.cpu(), want + 1):
            raise AssertionError(f"expected {size} words unchanged by NCCL at size 1. Received: {name}, round {round_}")
    return early


def main() -> None:
    """Run at size 1."""
    hvd.init()
    if not hvd.nccl_built():
        sys.exit("this Horovod was built without NCCL")
    torch.cuda.set_device(hvd.local_rank())
    asynchronous = os.environ["HOROVOD_ENABLE_ASYNC_COMPLETION"]
    for name, may_wait in (("hvd_syncbn.packet", False), ("gradient", asynchronous == "0")):
        early = [check(size, name) for size in SIZES]
        if 0 in early and not may_wait:
            raise AssertionError(f"expected Horovod not to wait for the GPU. Received: {name}, it waited in every round")
        print(f"equal: {len(SIZES) * ROUNDS} of {name}, asynchronous completion {asynchronous}, {sum(early)} without waiting")
    hvd.shutdown()


if __name__ == "__main__":
    main()
