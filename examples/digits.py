"""Arguments, data and order of the samples, shared by the demo's jobs in both frameworks."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

GLOBAL_BATCH = 4  # two images per rank on two ranks
SEED = 7
CLASSES = 10


def arguments() -> argparse.Namespace:
    """Return the command line arguments of one run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", choices=("sync", "local"), required=True)
    parser.add_argument("--epochs", type=int, required=True)
    return parser.parse_args()


def data() -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return `(x_train, y_train, x_test, y_test)` of scikit-learn's digits: x [n, 8, 8, 1] in [0, 1], y [n]."""
    digits = load_digits()
    x = (digits.images / 16.0).astype(np.float32)[..., None]
    y = digits.target.astype(np.int64)
    order = np.random.default_rng(SEED).permutation(len(x))
    train, test = order[:800], order[800:]
    return x[train], y[train], x[test], y[test]


def epoch_order(epoch: int, samples: int) -> NDArray[Any]:
    """Return the samples of each global batch of an epoch, [steps, GLOBAL_BATCH], the same for any number of ranks."""
    order = np.random.default_rng((SEED, epoch)).permutation(samples)
    steps = samples // GLOBAL_BATCH
    return order[: steps * GLOBAL_BATCH].reshape(steps, GLOBAL_BATCH)


def share(batch: NDArray[Any], rank: int, size: int) -> NDArray[Any]:
    """Return this rank's samples of one or more global batches; the last axis is the batch."""
    each = GLOBAL_BATCH // size
    return batch[..., rank * each : (rank + 1) * each]
