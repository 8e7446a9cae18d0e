"""Segment photographs with Keras 3 and `model.fit`, as with_torch.py does; `run.py` runs it with each kind of norm.

horovodrun -np 4 -H localhost:4 python examples/segmentation/with_keras.py --layer sync --out out/run.npz
"""

from __future__ import annotations

from typing import Any

import keras
import photos
import tensorflow as tf

import hvd_syncbn.keras as hvd

layers = keras.layers


def block(x: Any, outputs: int, **options: int) -> Any:
    """Apply a convolution, a norm and relu."""
    x = layers.Conv2D(outputs, 3, padding="same", use_bias=False, **options)(x)
    return layers.ReLU()(layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x))


def build() -> keras.Model:
    """Return the network of with_torch.py, channels last, for images of any size."""
    image = keras.Input((None, None, 1))
    full = block(image, 16)
    half = block(full, 32, strides=2)
    x = block(half, 64, strides=2)
    x = block(block(x, 64, dilation_rate=2), 64, dilation_rate=4)
    x = block(layers.Concatenate()([layers.UpSampling2D()(x), half]), 32)
    x = block(layers.Concatenate()([layers.UpSampling2D()(x), full]), 16)
    return keras.Model(image, layers.Conv2D(len(photos.CLASSES), 1)(x))


class Evaluation(keras.callbacks.Callback):
    """Score the test strips after every round, on rank 0."""

    def __init__(self, scores: photos.Scores) -> None:
        super().__init__()
        self.scores = scores

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Evaluate; the other ranks wait in the next step."""
        if hvd.rank() == 0:
            found = [self.model(gray[None], training=False)[0].numpy().argmax(-1) for gray, _ in self.scores.test]
            print(self.scores.add(found), flush=True)


def main() -> None:
    """Train on one rank."""
    args = photos.arguments()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init()
    keras.utils.set_random_seed(photos.SEED)
    train, test = photos.load()
    stream = tf.data.Dataset.from_tensor_slices(photos.patches(train, hvd.rank(), hvd.size()))

    model = build()
    if args.layer == "sync":
        model = hvd.convert_sync_batchnorm(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(1e-3)), loss)
    scores = photos.Scores(test)
    model.fit(
        stream,
        epochs=photos.STEPS // photos.ROUND,
        steps_per_epoch=photos.ROUND,
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0), Evaluation(scores)],
        shuffle=False,
        verbose=0,
    )
    if hvd.rank() == 0:
        scores.save(args.out)
    hvd.allgather_object(None)  # the first rank that ends shuts Horovod down for all


if __name__ == "__main__":
    main()
