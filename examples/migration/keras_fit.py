"""Train with `model.fit`: the calls of Horovod's Keras examples (MNIST, ImageNet, synthetic benchmark), on generated data.

horovodrun -np 2 -H localhost:2 python examples/migration/keras_fit.py
"""

# Before, which fails on Keras 3: import horovod.tensorflow.keras as hvd
import keras
import numpy as np

import hvd_syncbn.keras as hvd


def main(folder: str = "out") -> dict[str, list[float]]:
    hvd.init()
    epochs, warmup_epochs = 4, 2
    # All ranks resume from rank 0's epoch.
    resume_from_epoch = int(hvd.broadcast(0 if hvd.rank() == 0 else -1, 0, name="resume_from_epoch"))

    rng = np.random.default_rng(hvd.rank())
    images = rng.normal(size=(16, 8, 8, 1)).astype("float32")
    labels = (images.mean((1, 2, 3)) > 0).astype("int64")

    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dropout(0.25),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    initial_lr = 0.05 * hvd.size()
    optimizer = keras.optimizers.SGD(initial_lr, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(
        optimizer, compression=hvd.Compression.fp16, backward_passes_per_step=1, average_aggregated_gradients=True
    )
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])

    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateWarmupCallback(initial_lr=initial_lr, warmup_epochs=warmup_epochs, verbose=1),
        hvd.callbacks.LearningRateScheduleCallback(
            initial_lr=initial_lr, multiplier=1.0, start_epoch=warmup_epochs, end_epoch=3
        ),
        hvd.callbacks.LearningRateScheduleCallback(initial_lr=initial_lr, multiplier=lambda epoch: 0.1, start_epoch=3),
    ]
    if hvd.rank() == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint(f"{folder}/checkpoint-{{epoch}}.keras"))

    history = model.fit(
        images,
        labels,
        batch_size=8,
        epochs=epochs,
        initial_epoch=resume_from_epoch,
        callbacks=callbacks,
        validation_data=(images, labels),
        verbose=0,
    )
    score = hvd.allreduce(model.evaluate(images, labels, verbose=0))
    if hvd.rank() == 0:
        print(f"Number of ranks: {hvd.size()}. Test loss and accuracy: {score.numpy()}")
    seen: dict[str, list[float]] = history.history | {"score": score.numpy().tolist()}
    return seen


if __name__ == "__main__":
    main()
