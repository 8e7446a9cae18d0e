"""NCCL through Horovod at size 1: `python -m benchmarks.gpu.nccl 0`, or `1` with asynchronous completion.

The packets are int64 tensors that a side stream is still to write when they are enqueued.
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


def packets() -> None:
    """Enqueue, reduce and read packets of every size on a side stream; raises where a value is wrong."""
    stream = torch.cuda.Stream()
    for size in SIZES:
        want = torch.arange(size, dtype=torch.int64) * (2**40 + 1)
        source = want.cuda()
        torch.cuda.synchronize()
        for round_ in range(ROUNDS):
            with torch.cuda.stream(stream):
                packet = torch.zeros(size, dtype=torch.int64, device="cuda")
                if round_ == 0:
                    torch.cuda._sleep(CYCLES)
                packet.copy_(source)
                if round_ % 2:
                    hvd.allreduce_(packet, name=f"packet.{size}", op=hvd.Sum)
                else:
                    hvd.synchronize(hvd.allreduce_async_(packet, name=f"packet.{size}", op=hvd.Sum))
                after = packet + 1  # on the same stream, behind the collective
                packet.zero_()
            stream.synchronize()
            if not torch.equal(after.cpu(), want + 1):
                raise AssertionError(
                    f"expected the packet of {size} words unchanged by NCCL at size 1. Received: round {round_}"
                )


def main() -> None:
    """Run at size 1."""
    hvd.init()
    if not hvd.nccl_built():
        sys.exit("this Horovod was built without NCCL")
    torch.cuda.set_device(hvd.local_rank())
    packets()
    print(f"equal: {len(SIZES) * ROUNDS} packets, asynchronous completion {os.environ['HOROVOD_ENABLE_ASYNC_COMPLETION']}")
    hvd.shutdown()


if __name__ == "__main__":
    main()
