"""Train in a custom loop: the calls of Horovod's TensorFlow 2 examples (MNIST, synthetic benchmark), on generated data.

horovodrun -np 2 -H localhost:2 python examples/migration/gradient_tape.py
"""

# Before, which fails on Keras 3: import horovod.tensorflow as hvd
import keras
import tensorflow as tf

import hvd_syncbn.keras as hvd


def main() -> list[list[float]]:
    hvd.init()
    tf.random.set_seed(hvd.rank())
    images, labels = tf.random.normal((24, 6)), tf.random.uniform((24,), 0, 3, tf.int64)
    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).repeat().batch(4)

    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy()
    optimizer = keras.optimizers.Adam(0.001 * hvd.size())

    @tf.function
    def training_step(images: tf.Tensor, labels: tf.Tensor, first_batch: bool) -> tf.Tensor:
        with tf.GradientTape() as tape:
            probabilities = model(images, training=True)
            value = loss(labels, probabilities)
        tape = hvd.DistributedGradientTape(tape, compression=hvd.Compression.fp16)
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return value

    for batch, (images, labels) in enumerate(dataset.take(8 // hvd.size())):
        value = training_step(images, labels, batch == 0)
        if batch == 0:
            # The optimizer has its variables now. In Keras 3, `optimizer.variables` is not a method.
            hvd.broadcast_variables(model.variables, root_rank=0)
            hvd.broadcast_variables(optimizer.variables, root_rank=0)
        if batch % 10 == 0 and hvd.local_rank() == 0:
            print(f"Step {batch}: loss {value:.6f}")
    return [v.numpy().ravel().tolist() for v in model.trainable_variables]


if __name__ == "__main__":
    main()
