"""Convert a small trained network from PyTorch to Keras and back, and compare its outputs.

    python examples/exchange.py

Batch norms are converted by `BatchNormState`. The functions below handle the other differences between the frameworks: the
order of a kernel's axes, padding, and the order of values after `Flatten`.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
import torch
from numpy.typing import NDArray
from torch import nn

from hvd_syncbn.keras import SyncBatchNormalization
from hvd_syncbn.keras import get_state as keras_state
from hvd_syncbn.keras import set_state as set_keras_state
from hvd_syncbn.torch import SyncBatchNorm
from hvd_syncbn.torch import get_state as torch_state
from hvd_syncbn.torch import set_state as set_torch_state

SIZE, FILTERS, CLASSES = 8, 6, 10
# The two frameworks' convolutions and matrix products add in different orders, which changes outputs of about 1 by 4e-7.
# A wrong axis, momentum or epsilon changes them by 1e-3 or more.
TOLERANCE = 1e-5

Images = NDArray[np.float32]


def torch_network() -> nn.Sequential:
    """Return the network in PyTorch, channels first."""
    return nn.Sequential(
        nn.Conv2d(3, FILTERS, 3, stride=2, padding=1, bias=False),
        SyncBatchNorm(FILTERS, activation="relu"),
        nn.Conv2d(FILTERS, FILTERS, 3, padding=1, groups=2),
        nn.BatchNorm2d(FILTERS),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(FILTERS * (SIZE // 2) ** 2, 12),
        nn.BatchNorm1d(12),
        nn.Linear(12, CLASSES),
    )


def keras_network(data_format: str = "channels_last") -> keras.Sequential:
    """Return the same network in Keras. With a stride, Keras's "same" pads only one side, so there is a padding layer."""
    layers = keras.layers
    axis = -1 if data_format == "channels_last" else 1
    options = {"data_format": data_format}
    return keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3) if axis == -1 else (3, SIZE, SIZE)),
            layers.ZeroPadding2D(1, **options),
            layers.Conv2D(FILTERS, 3, strides=2, use_bias=False, **options),
            SyncBatchNormalization(axis=axis, activation="relu"),
            layers.Conv2D(FILTERS, 3, padding="same", groups=2, **options),
            layers.BatchNormalization(axis=axis),
            layers.ReLU(),
            layers.Flatten(data_format="channels_last"),  # in memory order; `flattened` gives the order
            layers.Dense(12),
            layers.BatchNormalization(),
            layers.Dense(CLASSES),
        ]
    )


def weights(layer: Any, kinds: tuple[type, ...]) -> list[Any]:
    """Return the layers of these kinds, in order."""
    return [part for part in layer if isinstance(part, kinds)]


def pairs(torch_model: nn.Sequential, keras_model: keras.Sequential) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the convolutions, dense layers and norms of both networks as pairs `(PyTorch's, Keras's)`."""
    kinds = (
        ((nn.Conv2d,), (keras.layers.Conv2D,)),
        ((nn.Linear,), (keras.layers.Dense,)),
        ((nn.modules.batchnorm._BatchNorm,), (keras.layers.BatchNormalization,)),
    )
    first, second, third = (list(zip(weights(torch_model, a), weights(keras_model.layers, b), strict=True)) for a, b in kinds)
    return first, second, third


def flattened(channels_last: bool) -> NDArray[np.int64]:
    """Return the index in PyTorch (channels first) of each value of a flattened image in Keras."""
    places = np.arange(FILTERS * (SIZE // 2) ** 2).reshape(FILTERS, SIZE // 2, SIZE // 2)
    return (places.transpose(1, 2, 0) if channels_last else places).reshape(-1)


def to_keras(torch_model: nn.Sequential, keras_model: keras.Sequential) -> None:
    """Copy all weights and states from PyTorch to Keras."""
    convolutions, dense, norms = pairs(torch_model, keras_model)
    for a, b in convolutions:  # (out, in, height, width) -> (height, width, in, out)
        b.set_weights([t.detach().numpy().transpose(2, 3, 1, 0) if t.ndim == 4 else t.detach().numpy() for t in a.parameters()])
    order = flattened(convolutions[0][1].data_format == "channels_last")
    for a, b in dense:  # (out, in) -> (in, out)
        kernel = a.weight.detach().numpy().T
        b.set_weights([kernel[order] if len(kernel) == len(order) else kernel, a.bias.detach().numpy()])
    for a, b in norms:
        set_keras_state(b, torch_state(a))


def to_torch(keras_model: keras.Sequential, torch_model: nn.Sequential) -> None:
    """Copy all weights and states from Keras to PyTorch."""
    convolutions, dense, norms = pairs(torch_model, keras_model)
    order = flattened(convolutions[0][1].data_format == "channels_last")
    with torch.no_grad():
        for a, b in convolutions:
            for tensor, value in zip(a.parameters(), b.get_weights(), strict=True):
                tensor.copy_(torch.from_numpy(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value))
        for a, b in dense:
            kernel, bias = b.get_weights()
            kernel = kernel[np.argsort(order)] if len(kernel) == len(order) else kernel
            a.weight.copy_(torch.from_numpy(kernel.T))
            a.bias.copy_(torch.from_numpy(bias))
    for a, b in norms:
        set_torch_state(a, keras_state(b))


def answers(network: Any, images: Images) -> NDArray[np.float32]:
    """Return the network's outputs [n, 10] for images [n, height, width, 3], in evaluation mode."""
    if isinstance(network, nn.Module):
        with torch.no_grad():
            return network.eval()(torch.from_numpy(images).movedim(-1, 1)).numpy()
    first = network.input_shape[1] == 3
    # On a CPU, TensorFlow's own convolutions support only channels last; XLA supports both.
    evaluate = tf.function(lambda x: network(x, training=False), jit_compile=first, autograph=False)
    return np.asarray(evaluate(images.transpose(0, 3, 1, 2) if first else images))


def trained() -> nn.Sequential:
    """Return a network with random weights and statistics in place of trained ones."""
    torch.manual_seed(0)
    network = torch_network()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.5, 2) if "var" in name else tensor.normal_()
    return network


def main() -> None:
    """Convert in both directions, in both of Keras's layouts."""
    images = np.random.default_rng(0).standard_normal((16, SIZE, SIZE, 3)).astype(np.float32)
    torch_model = trained()
    want = answers(torch_model, images)
    for data_format in ("channels_last", "channels_first"):
        keras_model, back = keras_network(data_format), torch_network()
        to_keras(torch_model, keras_model)
        to_torch(keras_model, back)
        difference = float(np.abs(answers(keras_model, images) - want).max())
        print(f"PyTorch -> Keras, {data_format}: largest difference {difference:.1g} of outputs up to {np.abs(want).max():.1f}")
        equal = answers(back, images).tobytes() == want.tobytes()
        print(f"Keras, {data_format} -> PyTorch: {'every bit equal' if equal else 'NOT EQUAL'}")
        if difference > TOLERANCE * np.abs(want).max() or not equal:
            raise SystemExit("the networks differ: see the lines above")


if __name__ == "__main__":
    main()
