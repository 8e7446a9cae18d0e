"""A user's typed script with Keras's face, checked by `mypy --strict` in tests/unit/test_typing.py, not run.

Keras and TensorFlow have no types, so theirs are `Any`; ours are not.
"""

from typing import Any

import keras
import numpy as np
from typing_extensions import assert_type  # in typing from Python 3.11 on

import hvd_syncbn.keras as hvd
from hvd_syncbn.exchange import BatchNormState
from hvd_syncbn.keras import SyncBatchNormalization, elastic, get_state, groups, set_state
from hvd_syncbn.tensorflow import sync_batch_norm


class Doubled(SyncBatchNormalization):
    """A class of one's own."""

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None, residual: Any = None) -> Any:
        return 2 * super().call(inputs, training=training, mask=mask, residual=residual)


def main() -> None:
    hvd.init()
    model = keras.Sequential([keras.Input((8,)), Doubled(activation="relu", momentum=0.9), keras.layers.Dense(1)])
    model = hvd.convert_sync_batchnorm(model, process_set=groups(8).mine)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=hvd.Compression.fp16)
    model.compile(optimizer, "mse")
    callbacks = [
        hvd.BroadcastVariablesCallback(),
        hvd.MetricAverageCallback(weighted=True),
        hvd.LearningRateWarmupCallback(0.1 * hvd.size(), warmup_epochs=2.5),
        hvd.callbacks.BestModelCheckpoint(filepath="best.keras"),
    ]
    state = elastic.KerasState(model, batch=0, epoch=0)

    @elastic.run
    def train(state: elastic.KerasState) -> None:
        x = np.ones((4, 8), np.float32)
        model.fit(x, x[:, :1], callbacks=[*callbacks, elastic.CommitStateCallback(state, batches_per_commit=2)])

    train(state)
    hvd.check_ranks_agree(model, optimizer, local=[model.layers[0]])
    hvd.recalibrate(model, [np.ones((4, 8), np.float32)], layer_by_layer=True)
    print(hvd.diagnose(hvd.accumulate_statistics(model, 4), [np.ones((4, 8), np.float32)]).advice)
    found = get_state(model.layers[0])
    assert_type(found, BatchNormState)
    set_state(SyncBatchNormalization(), found)
    sync_batch_norm(np.ones((4, 8), np.float32), None, None, np.zeros(8), np.ones(8), training=True)
    hvd.revert_sync_batchnorm(model).save("model.keras")
    hvd.load_model("best.keras", compile=False)

    # What is wrong is seen: an unused ignore would be an error, too.
    hvd.recalibrate(model, [], estimater="batches")  # type: ignore[call-arg]
    hvd.MetricAverageCallback(weighed=True)  # type: ignore[call-arg]
    elastic.CommitStateCallback(state, "2")  # type: ignore[arg-type]
    count: int = get_state(model.layers[0])  # type: ignore[assignment]
    print(count)


if __name__ == "__main__":
    main()
