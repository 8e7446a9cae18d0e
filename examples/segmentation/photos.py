"""Patches of photographs, scores, and the result file of a run, shared by both frameworks.

scikit-learn's two photographs, a pagoda over a lake and a flower, are cut into vertical strips for training and narrower strips
between them for the test. A pixel's class is derived from its color: pale (sky, water), green or dark (leaves), warm (roofs,
petals). The network sees the photograph in gray and must use brightness, texture and surroundings.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import rgb_to_hsv
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images

CLASSES = ("pale", "leaves", "warm")
PATCH, HEIGHT = 64, 424
TRAIN, TEST = 96, 64
"""Widths of the strips in pixels, alternating."""
STEPS, ROUND = 200, 25
"""Steps of a training run, and steps between two evaluations."""
SEED = 3

Array = NDArray[Any]


def arguments() -> argparse.Namespace:
    """Return the command line arguments of one run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", choices=("sync", "local"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def labels(photo: Array) -> Array:
    """Return the class of each pixel [height, width] of an RGB photograph [height, width, 3] in [0, 1]."""
    # Average 5 x 5 pixels, so that classes are areas instead of single pixels.
    padded = np.pad(photo, ((2, 2), (2, 2), (0, 0)), mode="edge")
    smooth = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(0, 1)).mean((-1, -2))
    hue, saturation, value = np.moveaxis(rgb_to_hsv(smooth), -1, 0)
    warm = ((hue < 0.12) | (hue > 0.93)) & (saturation > 0.35) & (value > 0.3)
    pale = ~warm & (saturation < 0.3) & (value > 0.55)
    return np.where(warm, 2, np.where(pale, 0, 1)).astype(np.int64)


def load() -> tuple[list[tuple[Array, Array]], list[tuple[Array, Array]]]:
    """Return strips for training and for the test, each (gray [424, width, 1] in [-1, 1], labels [424, width])."""
    train, test = [], []
    for image in load_sample_images().images:
        photo = image[:HEIGHT] / 255.0
        gray = (2 * photo.mean(-1, keepdims=True) - 1).astype(np.float32)
        classes = labels(photo)
        for left in range(0, photo.shape[1], TRAIN + TEST):
            middle, right = left + TRAIN, left + TRAIN + TEST
            train.append((gray[:, left:middle], classes[:, left:middle]))
            test.append((gray[:, middle:right], classes[:, middle:right]))
    return train, test


def patches(train: list[tuple[Array, Array]], rank: int, size: int) -> tuple[Array, Array]:
    """Return this rank's patch of every step, some mirrored: x [steps, 1, 64, 64, 1], y [steps, 1, 64, 64]."""
    random = np.random.default_rng(SEED)
    x, y = [], []
    for number in range(STEPS * size):
        gray, classes = train[random.integers(len(train))]
        top, left = (int(random.integers(edge - PATCH + 1)) for edge in classes.shape)
        turn = slice(None, None, int(random.choice((-1, 1))))
        if number % size == rank:
            x.append(gray[top : top + PATCH, left : left + PATCH][:, turn])
            y.append(classes[top : top + PATCH, left : left + PATCH][:, turn])
    return np.stack(x)[:, None], np.stack(y)[:, None]


class Scores:
    """Predictions and scores of the test strips after every round of steps."""

    def __init__(self, test: list[tuple[Array, Array]]) -> None:
        self.test = test
        self.intersections_over_unions: list[list[float]] = []
        self.accuracies: list[float] = []
        self.predictions: list[Array] = []

    def add(self, predictions: list[Array]) -> str:
        """Store the predicted classes [424, 64] of each strip and their scores; return a line to print."""
        self.predictions = predictions
        found, expected = np.concatenate(predictions), np.concatenate([classes for _, classes in self.test])
        both = [np.sum((found == c) & (expected == c)) / np.sum((found == c) | (expected == c)) for c in range(len(CLASSES))]
        self.intersections_over_unions.append([float(value) for value in both])
        self.accuracies.append(float(np.mean(found == expected)))
        step = ROUND * len(self.accuracies)
        return f"step {step}/{STEPS} mean IoU {np.mean(both):.3f} accuracy {self.accuracies[-1]:.3f}"

    def save(self, path: Path) -> None:
        """Write the scores and the last predictions to an .npz file."""
        np.savez(path, iou=self.intersections_over_unions, accuracy=self.accuracies, predictions=np.stack(self.predictions))
