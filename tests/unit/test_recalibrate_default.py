"""The case that `recalibrate` is for, in both frameworks: training accuracy is high, evaluation is poor, one call mends it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

CLASSES, SAMPLES, BATCH, EPOCHS = 4, 128, 32, 5

Array = NDArray[np.float32]


def data(shuffled: bool = True, apart: float = 3.0) -> tuple[Array, NDArray[np.int64]]:
    """Images of four classes, each a color and noise."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(CLASSES), SAMPLES // CLASSES))
    if not shuffled:
        labels = np.sort(labels)
    x = rng.standard_normal((SAMPLES, 3, 6, 6)) + apart * rng.standard_normal((CLASSES, 3, 1, 1))[labels] + 3
    return x.astype(np.float32), labels


class Torch:
    def __init__(self) -> None:
        pytest.importorskip("horovod.torch").init()
        import torch
        from torch import nn

        from hvd_syncbn.torch import SyncBatchNorm

        torch.manual_seed(0)

        def block(channels: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, 8, 3, padding=1), SyncBatchNorm(8, momentum=0.01), nn.ReLU()]

        self.model = nn.Sequential(*block(3), *block(8), *block(8), nn.Flatten(), nn.Linear(288, CLASSES))

    def fit(self, x: Array, y: NDArray[np.int64]) -> None:
        import torch

        optimizer = torch.optim.Adam(self.model.parameters(), 5e-3)
        for _ in range(EPOCHS):
            for part, labels in zip(torch.tensor(x).split(BATCH), torch.tensor(y).split(BATCH), strict=True):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(self.model(part), labels).backward()
                optimizer.step()

    def accuracy(self, x: Array, y: NDArray[np.int64], training: bool) -> float:
        import torch

        model = copy.deepcopy(self.model).train(training)
        with torch.no_grad():
            return float((model(torch.tensor(x)).argmax(1).numpy() == y).mean())

    def set_nan(self) -> None:
        self.model[1].running_mean[2] = self.model[4].running_var[0] = float("nan")

    def recalibrate(self, x: Array, **options: Any) -> None:
        import torch

        from hvd_syncbn.torch import recalibrate

        recalibrate(self.model, torch.tensor(x).split(BATCH), **options)

    def statistics(self) -> list[Array]:
        return [t.numpy() for m in (self.model[1], self.model[4]) for t in (m.running_mean.clone(), m.running_var.clone())]


class Keras:
    def __init__(self) -> None:
        pytest.importorskip("horovod.tensorflow").init()
        import keras

        from hvd_syncbn.keras import SyncBatchNormalization

        keras.utils.set_random_seed(0)
        blocks = [
            layer
            for _ in range(3)
            for layer in (keras.layers.Conv2D(8, 3, padding="same"), SyncBatchNormalization(), keras.layers.ReLU())
        ]
        head = [keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
        self.model = keras.Sequential([keras.Input((6, 6, 3)), *blocks, *head])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(keras.optimizers.Adam(5e-3), loss, metrics=["accuracy"])

    def fit(self, x: Array, y: NDArray[np.int64]) -> None:
        self.model.fit(np.moveaxis(x, 1, -1), y, batch_size=BATCH, epochs=EPOCHS, verbose=0)

    def accuracy(self, x: Array, y: NDArray[np.int64], training: bool) -> float:
        images = np.moveaxis(x, 1, -1)
        if not training:
            return float(self.model.evaluate(images, y, batch_size=BATCH, verbose=0, return_dict=True)["accuracy"])
        before = self.model.get_weights()
        outputs = self.model(images, training=True)
        self.model.set_weights(before)
        return float((np.argmax(outputs, 1) == y).mean())

    def _norms(self) -> list[Any]:
        return [self.model.layers[1], self.model.layers[4]]

    def set_nan(self) -> None:
        for norm, place in zip(self._norms(), (2, 3), strict=True):
            weights = norm.get_weights()
            weights[place][0] = np.nan
            norm.set_weights(weights)

    def recalibrate(self, x: Array, **options: Any) -> None:
        from hvd_syncbn.keras import recalibrate

        images = np.moveaxis(x, 1, -1)
        recalibrate(self.model, [images[i : i + BATCH] for i in range(0, SAMPLES, BATCH)], **options)

    def statistics(self) -> list[Array]:
        return [v.numpy() for norm in self._norms() for v in (norm.moving_mean, norm.moving_variance)]


@pytest.mark.parametrize("framework", [Torch, Keras])
def test_the_default_mends_lagging_statistics(framework: type[Any]) -> None:
    """In one call, without a warning; after an overflow, too, and to the same bytes: old statistics have no part in it."""
    x, y = data()
    model = framework()
    model.fit(x, y)
    assert model.accuracy(x, y, training=True) == 1.0
    assert model.accuracy(x, y, training=False) < 0.6
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.recalibrate(x)
    assert model.accuracy(x, y, training=False) == 1.0
    mended = model.statistics()
    model.set_nan()
    assert model.accuracy(x, y, training=False) < 0.6
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.recalibrate(x)
    assert [a.tobytes() for a in model.statistics()] == [a.tobytes() for a in mended]
    model.set_nan()
    model.recalibrate(x, layer_by_layer=True)
    assert model.accuracy(x, y, training=False) == 1.0


@pytest.mark.parametrize("framework", [Torch, Keras])
def test_batches_of_one_class_are_warned_of(framework: type[Any]) -> None:
    """Each batch's own statistics are not those of the data then. Layer by layer, the order of the data has no part in it."""
    x, _ = data(shuffled=False, apart=20.0)
    model = framework()
    with pytest.warns(UserWarning, match=r"the batches differ.*layer .* times the standard.*Shuffle the data"):
        model.recalibrate(x)
    model.recalibrate(x, layer_by_layer=True)
    exact = model.statistics()
    order = np.random.default_rng(1).permutation(SAMPLES)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.recalibrate(x[order])
    for got, want in zip(model.statistics(), exact, strict=True):
        np.testing.assert_allclose(got, want, rtol=0.1, atol=0.1)  # another estimator
