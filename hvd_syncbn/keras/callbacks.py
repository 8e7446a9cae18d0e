"""``hvd.callbacks``: what Horovod has under this name, for Keras 3."""

from hvd_syncbn.tf_impl.keras.callbacks import (
    BestModelCheckpoint,
    BroadcastGlobalVariablesCallback,
    BroadcastVariablesCallback,
    LearningRateScheduleCallback,
    LearningRateWarmupCallback,
    MetricAverageCallback,
)

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "BroadcastVariablesCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]
