"""Train an elastic job in a custom loop: the calls of Horovod's elastic TensorFlow 2 examples, on generated data.

horovodrun -np 2 --min-np 1 -H localhost:1,127.0.0.1:1 --network-interface lo python examples/migration/elastic_tape.py
"""

# Before, which fails on Keras 3: import horovod.tensorflow as hvd
import keras
import tensorflow as tf

import hvd_syncbn.keras as hvd


def main() -> int:
    hvd.init()
    tf.random.set_seed(hvd.rank())
    dataset = tf.data.Dataset.from_tensor_slices((tf.random.normal((64, 6)), tf.random.normal((64, 1)))).repeat().batch(8)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1)])
    loss = keras.losses.MeanSquaredError()
    optimizer = keras.optimizers.SGD(0.01 * hvd.size())

    @tf.function
    def training_step(x: tf.Tensor, y: tf.Tensor, allreduce: bool = True) -> tf.Tensor:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        if allreduce:
            tape = hvd.DistributedGradientTape(tape)
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return value

    for x, y in dataset.take(1):
        training_step(x, y, allreduce=False)  # creates the optimizer's variables

    @hvd.elastic.run
    def train(state: hvd.elastic.TensorFlowKerasState) -> None:
        start = state.batch
        for i, (x, y) in enumerate(dataset.skip(start).take(12 // hvd.size() - start)):
            training_step(x, y)
            state.batch = start + i + 1
            state.commit()

    def on_state_reset() -> None:
        optimizer.learning_rate = 0.01 * hvd.size()

    state = hvd.elastic.TensorFlowKerasState(model, optimizer, batch=0)
    state.register_reset_callbacks([on_state_reset])
    train(state)
    batches: int = state.batch
    return batches


if __name__ == "__main__":
    main()
