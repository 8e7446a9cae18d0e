"""``hvd.callbacks``: Horovod's Keras callbacks, for Keras 3."""

from hvd_syncbn.tf_impl.keras.training.backup import BackupAndRestore
from hvd_syncbn.tf_impl.keras.training.callbacks import (
    BestModelCheckpoint,
    BroadcastGlobalVariablesCallback,
    BroadcastVariablesCallback,
    LearningRateScheduleCallback,
    LearningRateWarmupCallback,
    MetricAverageCallback,
)

__all__ = [
    "BackupAndRestore",
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "BroadcastVariablesCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]
