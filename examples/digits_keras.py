"""Train the network of digits_torch.py with Keras 3 and `model.fit`; `demo.py` runs it in three ways.

    horovodrun -np 2 -H localhost:2 python examples/digits_keras.py --layer sync --epochs 3

A Keras 3 job under Horovod uses three parts of hvd-syncbn: the layer (or `convert_sync_batchnorm(model)`), the
`DistributedOptimizer`, and the callbacks.
"""

from __future__ import annotations

from typing import Any

import digits
import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from hvd_syncbn.keras import (
    BroadcastVariablesCallback,
    DistributedOptimizer,
    MetricAverageCallback,
    SyncBatchNormalization,
)


def normalize(x: Any, layer: str, residual: Any = None) -> Any:
    """Apply batch normalization, the shortcut and relu: one fused layer, or Keras's three layers."""
    if layer == "sync":
        return SyncBatchNormalization(activation="relu", momentum=0.9)(x, residual=residual)
    x = keras.layers.BatchNormalization(momentum=0.9)(x)
    return keras.layers.ReLU()(x if residual is None else keras.layers.Add()([x, residual]))


def build(layer: str) -> keras.Model:
    """Return the network of digits_torch.py, channels last."""
    layers = keras.layers
    image = keras.Input((8, 8, 1))
    x = normalize(layers.Conv2D(16, 3, padding="same", use_bias=False)(image), layer)
    x = normalize(layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False)(x), layer)
    x = normalize(layers.Conv2D(32, 3, padding="same", use_bias=False)(x), layer, residual=x)
    x = normalize(layers.Dense(64, use_bias=False)(layers.Flatten()(x)), layer)
    return keras.Model(image, layers.Dense(digits.CLASSES)(x))


class Report(keras.callbacks.Callback):
    """Print the training loss and the test accuracy after every epoch, on rank 0."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Print one line."""
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1}/{self.epochs} loss {logs['loss']:.4f} accuracy {logs['val_accuracy']:.4f}", flush=True)


def main() -> None:
    """Train on one rank."""
    args = digits.arguments()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init()
    keras.utils.set_random_seed(digits.SEED)
    x_train, y_train, x_test, y_test = digits.data()

    model = build(args.layer)
    optimizer = DistributedOptimizer(keras.optimizers.SGD(0.002, momentum=0.9))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])

    # All epochs in one stream: this rank's samples of every global batch.
    batches = np.concatenate([digits.epoch_order(epoch, len(x_train)) for epoch in range(args.epochs)])
    mine = digits.share(batches, hvd.rank(), hvd.size())
    stream = tf.data.Dataset.from_tensor_slices(mine).map(
        lambda samples: (tf.gather(x_train, samples), tf.gather(y_train, samples))
    )
    model.fit(
        stream,
        epochs=args.epochs,
        steps_per_epoch=len(batches) // args.epochs,
        validation_data=(x_test, y_test),
        validation_batch_size=256,
        callbacks=[BroadcastVariablesCallback(), MetricAverageCallback(), Report(args.epochs)],
        shuffle=False,
        verbose=0,
    )


if __name__ == "__main__":
    main()
