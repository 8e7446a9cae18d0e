"""What both frameworks share: photographs cut to patches, the score, and what a run leaves for run.py.

The photographs are scikit-learn's two, a pagoda over a lake and a flower, cut upright into strips for training and, between
them, narrower ones for the test. A pixel's class comes from its colour: pale (sky, water), green or dark (leaves), warm (roofs,
petals). The network sees the photograph in grey and has to tell them by brightness, texture and surroundings.
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
"""Widths of the strips, in turn."""
STEPS, ROUND = 200, 25
"""Steps of a training, and how many lie between two evaluations."""
SEED = 3

Array = NDArray[Any]


def arguments() -> argparse.Namespace:
    """The command line of one run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", choices=("sync", "local"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def labels(photo: Array) -> Array:
    """The class of each pixel of an RGB photograph [height, width, 3] in 0..1."""
    # Over 5 x 5 pixels, so that classes are areas and not grains.
    padded = np.pad(photo, ((2, 2), (2, 2), (0, 0)), mode="edge")
    smooth = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(0, 1)).mean((-1, -2))
    hue, saturation, value = np.moveaxis(rgb_to_hsv(smooth), -1, 0)
    warm = ((hue < 0.12) | (hue > 0.93)) & (saturation > 0.35) & (value > 0.3)
    pale = ~warm & (saturation < 0.3) & (value > 0.55)
    return np.where(warm, 2, np.where(pale, 0, 1)).astype(np.int64)


def load() -> tuple[list[tuple[Array, Array]], list[tuple[Array, Array]]]:
    """Strips for training and for the test: (grey [424, width, 1] in -1..1, labels [424, width])."""
    train, test = [], []
    for image in load_sample_images().images:
        photo = image[:HEIGHT] / 255.0
        grey = (2 * photo.mean(-1, keepdims=True) - 1).astype(np.float32)
        classes = labels(photo)
        for left in range(0, photo.shape[1], TRAIN + TEST):
            middle, right = left + TRAIN, left + TRAIN + TEST
            train.append((grey[:, left:middle], classes[:, left:middle]))
            test.append((grey[:, middle:right], classes[:, middle:right]))
    return train, test


def patches(train: list[tuple[Array, Array]], rank: int, size: int) -> tuple[Array, Array]:
    """This rank's patch of every step: x [steps, 1, 64, 64, 1], y [steps, 1, 64, 64]. Some are mirrored."""
    random = np.random.default_rng(SEED)
    x, y = [], []
    for number in range(STEPS * size):
        grey, classes = train[random.integers(len(train))]
        top, left = (int(random.integers(edge - PATCH + 1)) for edge in classes.shape)
        turn = slice(None, None, int(random.choice((-1, 1))))
        if number % size == rank:
            x.append(grey[top : top + PATCH, left : left + PATCH][:, turn])
            y.append(classes[top : top + PATCH, left : left + PATCH][:, turn])
    return np.stack(x)[:, None], np.stack(y)[:, None]


class Scores:
    """What a network says of the test strips, and how good that is, after every round of steps."""

    def __init__(self, test: list[tuple[Array, Array]]) -> None:
        self.test = test
        self.intersections_over_unions: list[list[float]] = []
        self.accuracies: list[float] = []
        self.predictions: list[Array] = []

    def add(self, predictions: list[Array]) -> str:
        """Keep the classes [424, 64] of each strip; return a line for the screen."""
        self.predictions = predictions
        found, expected = np.concatenate(predictions), np.concatenate([classes for _, classes in self.test])
        both = [np.sum((found == c) & (expected == c)) / np.sum((found == c) | (expected == c)) for c in range(len(CLASSES))]
        self.intersections_over_unions.append([float(value) for value in both])
        self.accuracies.append(float(np.mean(found == expected)))
        step = ROUND * len(self.accuracies)
        return f"step {step}/{STEPS} mean IoU {np.mean(both):.3f} accuracy {self.accuracies[-1]:.3f}"

    def save(self, path: Path) -> None:
        """Leave them in an .npz file."""
        np.savez(path, iou=self.intersections_over_unions, accuracy=self.accuracies, predictions=np.stack(self.predictions))
