"""Collectives through memory that the ranks share, and in the thread that waits for them; see test_shared_memory.py."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from tests.parallel.shared.segments import segments, sums_where_memory_is_short
from tests.parallel.shared.stages import stages_are_recorded

SIZES = (1, 127, 8192, 40000, 300001)  # elements: below and above each size from which the ranks exchange in another way
DTYPES = (tf.uint8, tf.int32, tf.int64, tf.float16, tf.float32, tf.float64)


def part(rank: int, size: int, dtype: tf.DType) -> Any:
    """A rank's tensor."""
    return np.random.default_rng(1000 * rank + size).integers(0, 50, size).astype(dtype.as_numpy_dtype)


def check_sums() -> None:
    for dtype in DTYPES:
        for size in SIZES:
            total = hvd.allreduce(tf.constant(part(hvd.rank(), size, dtype)), name=f"{dtype.name}.{size}", op=hvd.Sum)
            assert np.array_equal(total, sum(part(rank, size, dtype) for rank in range(hvd.size()))), (dtype, size)


def check_ranks_share_memory() -> None:
    assert segments() == 1
    hvd.allgather_object(None, name="all have looked")  # the first to leave ends Horovod for all


def check_sums_over_sockets_where_memory_is_short() -> None:
    sums_where_memory_is_short(hvd, check_sums)


def check_branches_in_another_order() -> None:
    """Operations that other layers wait for keep their thread for a while only: the ranks may begin with different ones."""
    backwards = hvd.rank() % 2 == 1

    @tf.function
    def branches(x: Any) -> Any:
        order = range(8, 0, -1) if backwards else range(1, 9)
        return tf.add_n([hvd.allreduce(x * i, name=f"hvd_syncbn.branch.{i}", op=hvd.Sum) for i in order])

    for i in range(50):
        assert branches(tf.constant([i, 1]))[0] == 36 * i * hvd.size()


def check_stages_are_recorded() -> None:
    """The times of an allreduce's stages (patch 0042) are in order, and between those of the call; none while this is off."""
    stages_are_recorded(hvd, lambda: hvd.allreduce(tf.ones(3), name="hvd_syncbn.stages", op=hvd.Sum))


def check_join() -> int:
    """The last rank has more to reduce; the others take part with zeros."""
    for i in range(50 if hvd.rank() == hvd.size() - 1 else 20):
        total = hvd.allreduce(tf.ones(3), name=f"hvd_syncbn.joined.{i % 5}", op=hvd.Sum)
        assert i >= 20 or total[0] == hvd.size()
    return int(hvd.join())
