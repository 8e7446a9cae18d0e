"""Synchronized batch normalization for Keras 3, and what it takes to train Keras 3 models under Horovod."""

from hvd_syncbn.tf_impl.keras.callbacks import BroadcastVariablesCallback, MetricAverageCallback
from hvd_syncbn.tf_impl.keras.convert import convert_sync_batchnorm, revert_sync_batchnorm
from hvd_syncbn.tf_impl.keras.fold import Scale, fold_batchnorm
from hvd_syncbn.tf_impl.keras.freeze import freeze_batchnorm, unfreeze_batchnorm
from hvd_syncbn.tf_impl.keras.layer import SyncBatchNormalization
from hvd_syncbn.tf_impl.keras.optimizer import DistributedOptimizer
from hvd_syncbn.tf_impl.keras.state import get_state, set_state

__all__ = [
    "BroadcastVariablesCallback",
    "DistributedOptimizer",
    "MetricAverageCallback",
    "Scale",
    "SyncBatchNormalization",
    "convert_sync_batchnorm",
    "fold_batchnorm",
    "freeze_batchnorm",
    "get_state",
    "revert_sync_batchnorm",
    "set_state",
    "unfreeze_batchnorm",
]
