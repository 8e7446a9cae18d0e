"""Train an elastic job with `model.fit`: the calls of Horovod's elastic Keras example, on generated data.

horovodrun -np 2 --min-np 1 -H localhost:1,127.0.0.1:1 --network-interface lo python examples/migration/elastic_fit.py
"""

# Before, which fails on Keras 3: import horovod.tensorflow.keras as hvd
import keras
import tensorflow as tf

import hvd_syncbn.keras as hvd


def main(folder: str = "out") -> tuple[int, int]:
    hvd.init()
    tf.random.set_seed(hvd.rank())
    dataset = tf.data.Dataset.from_tensor_slices((tf.random.normal((64, 6)), tf.random.normal((64, 1)))).repeat().batch(8)

    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.Adam(0.001 * hvd.size()), backward_passes_per_step=1, average_aggregated_gradients=True
    )
    model.compile(loss="mse", optimizer=optimizer, metrics=["mae"])

    state = hvd.elastic.KerasState(model, batch=0, epoch=0)

    def on_state_reset() -> None:
        state.model.optimizer.learning_rate = 0.001 * hvd.size()

    state.register_reset_callbacks([on_state_reset])
    callbacks = [
        hvd.elastic.UpdateEpochStateCallback(state),
        hvd.elastic.UpdateBatchStateCallback(state),
        hvd.elastic.CommitStateCallback(state, batches_per_commit=2),
    ]
    if hvd.rank() == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint(f"{folder}/elastic-{{epoch}}.keras"))

    @hvd.elastic.run
    def train(state: hvd.elastic.KerasState) -> None:
        state.model.fit(
            dataset, steps_per_epoch=6 // hvd.size(), epochs=3 - state.epoch, callbacks=callbacks, verbose=int(hvd.rank() == 0)
        )

    train(state)
    return state.epoch, state.batch


if __name__ == "__main__":
    main()
