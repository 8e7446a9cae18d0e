"""Synchronized batch normalization for Keras 3, and what it takes to train Keras 3 models under Horovod."""

from hvd_syncbn.tf_impl.keras_convert import convert_sync_batchnorm, revert_sync_batchnorm
from hvd_syncbn.tf_impl.keras_horovod import BroadcastVariablesCallback, DistributedOptimizer, MetricAverageCallback
from hvd_syncbn.tf_impl.keras_layer import SyncBatchNormalization

__all__ = [
    "BroadcastVariablesCallback",
    "DistributedOptimizer",
    "MetricAverageCallback",
    "SyncBatchNormalization",
    "convert_sync_batchnorm",
    "revert_sync_batchnorm",
]
