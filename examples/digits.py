"""What both frameworks' demos share: the data, the order in which it is seen, and what a run leaves for demo.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

GLOBAL_BATCH = 4  # two images per rank on two ranks
SEED = 7
CLASSES = 10


def arguments() -> argparse.Namespace:
    """The command line of one run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", choices=("sync", "local"), required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def data() -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """scikit-learn's handwritten digits, 8 x 8 pixels in [0, 1]: `(x_train, y_train, x_test, y_test)`, x as [n, 8, 8, 1]."""
    digits = load_digits()
    x = (digits.images / 16.0).astype(np.float32)[..., None]
    y = digits.target.astype(np.int64)
    order = np.random.default_rng(SEED).permutation(len(x))
    train, test = order[:800], order[800:]
    return x[train], y[train], x[test], y[test]


def epoch_order(epoch: int, samples: int) -> NDArray[Any]:
    """The global batches of an epoch, [steps, GLOBAL_BATCH], the same for every way of running."""
    order = np.random.default_rng((SEED, epoch)).permutation(samples)
    steps = samples // GLOBAL_BATCH
    return order[: steps * GLOBAL_BATCH].reshape(steps, GLOBAL_BATCH)


def share(batch: NDArray[Any], rank: int, size: int) -> NDArray[Any]:
    """This rank's samples of a global batch (or of many: the last axis is the batch)."""
    each = GLOBAL_BATCH // size
    return batch[..., rank * each : (rank + 1) * each]


class Recorder:
    """The parts of one training step, by name, in the order in which they are computed."""

    def __init__(self) -> None:
        self.parts: dict[str, NDArray[Any]] = {}

    def add(self, name: str, value: Any, scale: float = 1.0) -> None:
        """Keeps a copy, multiplied by a power of two, which is exact: gradients of a mean over fewer samples are larger."""
        self.parts[name] = np.array(value, copy=True) * np.float32(scale)


def save(path: Path, losses: list[float], accuracies: list[float], weights: list[Any], parts: dict[str, Any]) -> None:
    """Leaves a run's results in an .npz file."""
    arrays = {f"part/{i:03d}/{name}": value for i, (name, value) in enumerate(parts.items())}
    flat = np.concatenate([np.asarray(w, np.float64).reshape(-1) for w in weights])
    np.savez(path, losses=losses, accuracies=accuracies, weights=flat, **arrays)
