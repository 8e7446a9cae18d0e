"""The same steps several times, with gradients that are fused and with gradients that come one by one; see test_repeats.py."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.parallel.shared.segments import segments, short_memory

# Elements of the parameters: each alone is summed in a fixed order without shared memory, all together go through a ring.
SIZES = tuple(30000 + 37 * i for i in range(12))
DELAYS = (0.0, 0.02)  # seconds before each gradient: all in one fused tensor, or each alone

Gradients = list[NDArray[np.float32]]


def gradients(rank: int) -> Gradients:
    """This rank's, of values whose sum depends on its order."""
    rng = np.random.default_rng(rank)
    return [(rng.standard_normal(size) * 10.0 ** rng.integers(-3, 3, size)).astype(np.float32) for size in SIZES]


def digests(hvd: Any, train: Callable[[Gradients, float], Sequence[NDArray[Any]]]) -> list[str]:
    """Return the digests of the weights after the same step with each delay, twice.

    Args:
        hvd: the framework's Horovod, initialized.
        train: makes a model and a step by these gradients, each of which takes this time, and returns the weights.
    """
    if os.environ["REPEATS_OVER"] == "sockets":
        hvd.allgather_object(None, name="all are here")  # the first to leave ends Horovod for all
        hvd.shutdown()
        with short_memory():
            hvd.init()
        assert segments() == 0
    mine = gradients(hvd.rank())
    weights = [train(mine, delay) for delay in DELAYS * 2]
    return [hashlib.sha256(b"".join(w.tobytes() for w in run)).hexdigest() for run in weights]


def sleep(seconds: float) -> None:
    """Wait, if there is anything to wait for."""
    if seconds:
        time.sleep(seconds)
