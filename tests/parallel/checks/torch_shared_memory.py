"""Collectives through memory that the ranks share, and in the thread that waits for them; see test_shared_memory.py."""

from __future__ import annotations

import threading

import horovod.torch as hvd
import torch

from tests.parallel.shared.segments import segments, sums_where_memory_is_short
from tests.parallel.shared.stages import stages_are_recorded

SIZES = (1, 127, 8192, 40000, 300001)  # elements: below and above each size from which the ranks exchange in another way
DTYPES = (torch.int32, torch.int64, torch.float16, torch.float32, torch.float64)


def part(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """A rank's tensor."""
    generator = torch.Generator().manual_seed(1000 * rank + size)
    return torch.randint(0, 50, (size,), generator=generator).to(dtype)


def check_sums() -> None:
    for dtype in DTYPES:
        for size in SIZES:
            total = hvd.allreduce(part(hvd.rank(), size, dtype), name=f"{dtype}.{size}", op=hvd.Sum)
            assert torch.equal(total, sum(part(rank, size, dtype) for rank in range(hvd.size()))), (dtype, size)


def check_ranks_share_memory() -> None:
    assert segments() == 1
    hvd.allgather_object(None, name="all have looked")  # the first to leave ends Horovod for all


def check_sums_over_sockets_where_memory_is_short() -> None:
    sums_where_memory_is_short(hvd, check_sums)


def check_names_and_objects_of_other_sizes() -> None:
    """What is not in the cache is negotiated in shared memory, too: messages longer than a buffer, and of other lengths."""
    handles = [hvd.allreduce_async(torch.ones(1), name=f"{'long' * 500}.{i}", op=hvd.Sum) for i in range(400)]
    assert all(hvd.synchronize(handle).item() == hvd.size() for handle in handles)
    assert hvd.allgather_object("x" * hvd.rank(), name="strings") == ["x" * rank for rank in range(hvd.size())]


def check_two_threads_wait_at_once() -> None:
    """Each has its turn at running cycles, in no order that the ranks share."""
    failed = []

    def reduce(name: str) -> None:
        for i in range(300):
            if hvd.allreduce(torch.full((9,), i), name=f"{name}.{i % 7}", op=hvd.Sum)[0] != i * hvd.size():
                failed.append((name, i))

    threads = [threading.Thread(target=reduce, args=(name,)) for name in ("hvd_syncbn.one", "another")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def check_results_come_without_a_waiting_thread() -> None:
    """Horovod's thread is still there for a caller that only asks whether the result has come."""
    for i in range(20):
        handle = hvd.allreduce_async(torch.ones(5), name=f"hvd_syncbn.polled.{i}", op=hvd.Sum)
        while not hvd.poll(handle):
            pass
        assert hvd.synchronize(handle)[0] == hvd.size()


def check_stages_are_recorded() -> None:
    """The times of an allreduce's stages (patch 0042) are in order, and between those of the call; none while this is off."""
    stages_are_recorded(hvd, lambda: hvd.allreduce(torch.ones(3), name="hvd_syncbn.stages", op=hvd.Sum))


def check_join() -> int:
    """The last rank has more to reduce; the others take part with zeros, in their waiting thread."""
    for i in range(50 if hvd.rank() == hvd.size() - 1 else 20):
        total = hvd.allreduce(torch.ones(3), name=f"hvd_syncbn.joined.{i % 5}", op=hvd.Sum)
        assert i >= 20 or total[0] == hvd.size()
    return hvd.join()
