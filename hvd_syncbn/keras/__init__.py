"""Synchronized batch normalization and Horovod training for Keras 3.

``import hvd_syncbn.keras as hvd`` replaces ``import horovod.tensorflow.keras as hvd`` and ``import horovod.tensorflow as hvd``.
Horovod's own functions (``hvd.init``, ``hvd.rank``, ...) are available under the same names; Horovod is imported when one of
them is first used.
"""

import importlib
from typing import Any

from hvd_syncbn import horovod as _horovod
from hvd_syncbn.diagnosis import Diagnosis
from hvd_syncbn.keras import callbacks
from hvd_syncbn.tf_impl.groups import groups
from hvd_syncbn.tf_impl.keras.accumulate import accumulate_statistics
from hvd_syncbn.tf_impl.keras.convert import convert_sync_batchnorm, revert_sync_batchnorm
from hvd_syncbn.tf_impl.keras.diagnose import diagnose
from hvd_syncbn.tf_impl.keras.fold import Scale, fold_batchnorm
from hvd_syncbn.tf_impl.keras.freeze import freeze_batchnorm, unfreeze_batchnorm
from hvd_syncbn.tf_impl.keras.layer import SyncBatchNormalization
from hvd_syncbn.tf_impl.keras.recalibrate import recalibrate
from hvd_syncbn.tf_impl.keras.state import get_state, set_state
from hvd_syncbn.tf_impl.keras.take_part import take_part
from hvd_syncbn.tf_impl.keras.training import start as _start  # noqa: F401 (registers the training check)
from hvd_syncbn.tf_impl.keras.training.backup import BackupAndRestore
from hvd_syncbn.tf_impl.keras.training.callbacks import (
    BestModelCheckpoint,
    BroadcastGlobalVariablesCallback,
    BroadcastVariablesCallback,
    LearningRateScheduleCallback,
    LearningRateWarmupCallback,
    MetricAverageCallback,
)
from hvd_syncbn.tf_impl.keras.training.drift import check_ranks_agree
from hvd_syncbn.tf_impl.keras.training.functions import (
    DistributedGradientTape,
    PartialDistributedGradientTape,
    allgather,
    allreduce,
    broadcast,
    broadcast_variables,
    reducescatter,
)
from hvd_syncbn.tf_impl.keras.training.optimizer import DistributedOptimizer, PartialDistributedOptimizer
from hvd_syncbn.tf_impl.keras.training.saving import load_model

# Names that are forwarded to `horovod.tensorflow`.
_FORWARDED = {
    "Adasum",
    "Average",
    "Compression",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "Sum",
    "add_process_set",
    "allgather_object",
    "alltoall",
    "broadcast_global_variables",
    "broadcast_object",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rank",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
}


def __getattr__(name: str) -> Any:
    if name == "elastic":  # imports Horovod
        return importlib.import_module("hvd_syncbn.keras.elastic")
    if name in _FORWARDED:
        return getattr(_horovod.load("tensorflow"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FORWARDED, "elastic"})


__all__ = [
    "BackupAndRestore",
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "BroadcastVariablesCallback",
    "Diagnosis",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "PartialDistributedGradientTape",
    "PartialDistributedOptimizer",
    "Scale",
    "SyncBatchNormalization",
    "accumulate_statistics",
    "allgather",
    "allreduce",
    "broadcast",
    "broadcast_variables",
    "callbacks",
    "check_ranks_agree",
    "convert_sync_batchnorm",
    "diagnose",
    "fold_batchnorm",
    "freeze_batchnorm",
    "get_state",
    "groups",
    "load_model",
    "recalibrate",
    "reducescatter",
    "revert_sync_batchnorm",
    "set_state",
    "take_part",
    "unfreeze_batchnorm",
]
