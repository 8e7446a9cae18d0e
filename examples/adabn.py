"""Adapt to another domain (AdaBN) and insert norms into a trained network with `recalibrate`, in both frameworks.

    python examples/adabn.py            # or under horovodrun, each rank with its shard of the images

A network is trained on handwritten digits and then evaluated on images of another camera: brighter, with less contrast and with
noise. Its batch norms hold statistics that these images do not have. `recalibrate` on unlabeled images of the new domain
recovers most of the accuracy. Then norms are inserted as the identity into a trained network that has none.
"""

from __future__ import annotations

import itertools

import digits
import horovod.tensorflow
import horovod.torch as hvd
import keras
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvd_syncbn.keras
import hvd_syncbn.torch
from hvd_syncbn.keras import SyncBatchNormalization
from hvd_syncbn.torch import SyncBatchNorm

EPOCHS, BATCH = 4, 32


def other_camera(images: np.ndarray) -> np.ndarray:
    """Return the same digits as another camera would record them."""
    noise = np.random.default_rng(1).normal(0, 0.05, images.shape)
    return (0.6 + 0.3 * images + noise).astype(np.float32)


def mine(images: np.ndarray) -> list[np.ndarray]:
    """Return this rank's batches."""
    shard = images[hvd.rank() :: hvd.size()]
    return [shard[i : i + BATCH] for i in range(0, len(shard), BATCH)]


def epochs(x: np.ndarray, y: np.ndarray) -> itertools.chain[tuple[np.ndarray, np.ndarray]]:
    orders = (np.random.default_rng(epoch).permutation(len(x)) for epoch in range(EPOCHS))
    return itertools.chain.from_iterable(
        ((x[o[i : i + BATCH]], y[o[i : i + BATCH]]) for i in range(0, len(x), BATCH)) for o in orders
    )


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def torch_network(norms: bool) -> nn.Sequential:
    """Return convolution, norm and relu, twice, and a linear layer; without norms if `norms` is False."""

    def block(c_in: int, c_out: int) -> list[nn.Module]:
        conv = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=not norms)
        return [conv, SyncBatchNorm(c_out, activation="relu")] if norms else [conv, nn.ReLU()]

    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 4, digits.CLASSES))


def to_torch(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def train_torch(norms: bool) -> nn.Sequential:
    """Train on all images on every rank; the example is about what follows the training."""
    torch.manual_seed(digits.SEED)
    model = torch_network(norms)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x, y = digits.data()[:2]
    for images, labels in epochs(x, y):
        optimizer.zero_grad()
        F.cross_entropy(model(to_torch(images)), torch.from_numpy(labels)).backward()
        optimizer.step()
    return model.eval()


def torch_accuracy(model: nn.Module, x: np.ndarray, y: np.ndarray) -> float:
    with torch.no_grad():
        return float((model(to_torch(x)).argmax(1).numpy() == y).mean())


def torch_adapts() -> tuple[float, float, float]:
    """Return the test accuracy on the old domain, on the new domain, and on the new domain after `recalibrate`."""
    x, _, x_test, y_test = digits.data()
    model = train_torch(norms=True)
    before = torch_accuracy(model, x_test, y_test), torch_accuracy(model, other_camera(x_test), y_test)
    batches = [to_torch(images) for images in mine(other_camera(x))]
    hvd_syncbn.torch.recalibrate(model, batches, layer_by_layer=True)
    return *before, torch_accuracy(model, other_camera(x_test), y_test)


def torch_inserts() -> tuple[float, float]:
    """Return the largest change of an output by inserting norms, and the largest output."""
    x = digits.data()[0]
    plain = train_torch(norms=False)
    batches = [to_torch(images) for images in mine(x)]
    layers = [[m, SyncBatchNorm(m.out_channels)] if isinstance(m, nn.Conv2d) else [m] for m in plain]
    inserted = nn.Sequential(*itertools.chain.from_iterable(layers))
    hvd_syncbn.torch.recalibrate(inserted, batches, init_affine=True)
    with torch.no_grad():
        want, got = plain(to_torch(x)), inserted.eval()(to_torch(x))
    return float((got - want).abs().max()), float(want.abs().max())


# --- Keras ------------------------------------------------------------------------------------------------------------


def keras_network(norms: bool) -> keras.Sequential:
    """Return the network of `torch_network`, channels last."""

    def block(channels: int) -> list[keras.layers.Layer]:
        conv = keras.layers.Conv2D(channels, 3, strides=2, padding="same", use_bias=not norms)
        return [conv, SyncBatchNormalization(activation="relu", momentum=0.9) if norms else keras.layers.ReLU()]

    rest = [keras.layers.Flatten(), keras.layers.Dense(digits.CLASSES)]
    return keras.Sequential([keras.Input((8, 8, 1)), *block(16), *block(32), *rest])


def train_keras(norms: bool) -> keras.Sequential:
    keras.utils.set_random_seed(digits.SEED)
    model = keras_network(norms)
    model.compile(keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = digits.data()[:2]
    model.fit(x, y, BATCH, EPOCHS, verbose=0)
    return model


def keras_accuracy(model: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    return float((model.predict(x, verbose=0).argmax(1) == y).mean())


def keras_adapts() -> tuple[float, float, float]:
    """Return what `torch_adapts` returns, in Keras."""
    x, _, x_test, y_test = digits.data()
    model = train_keras(norms=True)
    before = keras_accuracy(model, x_test, y_test), keras_accuracy(model, other_camera(x_test), y_test)
    hvd_syncbn.keras.recalibrate(model, mine(other_camera(x)), layer_by_layer=True)
    return *before, keras_accuracy(model, other_camera(x_test), y_test)


def keras_inserts() -> tuple[float, float]:
    """Return what `torch_inserts` returns, in Keras."""
    x = digits.data()[0]
    plain = train_keras(norms=False)
    layers = [[m, SyncBatchNormalization()] if isinstance(m, keras.layers.Conv2D) else [m] for m in plain.layers]
    inserted = keras.Sequential([keras.Input((8, 8, 1)), *itertools.chain.from_iterable(layers)])
    hvd_syncbn.keras.recalibrate(inserted, mine(x), init_affine=True)
    want, got = plain.predict(x, verbose=0), inserted.predict(x, verbose=0)
    return float(np.abs(got - want).max()), float(np.abs(want).max())


def main() -> None:
    """Print the results of each framework."""
    hvd.init()
    horovod.tensorflow.init()
    for name, adapts, inserts in (("PyTorch", torch_adapts, torch_inserts), ("Keras", keras_adapts, keras_inserts)):
        old, new, adapted = adapts()
        change, largest = inserts()
        if hvd.rank() == 0:
            print(f"{name}: accuracy {old:.3f}, on the other camera's images {new:.3f}, recalibrated on them {adapted:.3f}")
            print(f"{name}: inserting norms changes outputs of up to {largest:.3g} by at most {change:.1e}")


if __name__ == "__main__":
    main()
