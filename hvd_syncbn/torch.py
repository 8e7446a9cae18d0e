"""Synchronized batch normalization for PyTorch. See ``SyncBatchNorm``."""

from hvd_syncbn.diagnosis import Diagnosis
from hvd_syncbn.torch_impl.accumulate import accumulate_statistics
from hvd_syncbn.torch_impl.convert import convert_sync_batchnorm, revert_sync_batchnorm
from hvd_syncbn.torch_impl.diagnose import diagnose
from hvd_syncbn.torch_impl.drift import check_ranks_agree
from hvd_syncbn.torch_impl.fold import Scale, fold_batchnorm
from hvd_syncbn.torch_impl.freeze import freeze_batchnorm, unfreeze_batchnorm
from hvd_syncbn.torch_impl.functional import sync_batch_norm
from hvd_syncbn.torch_impl.groups import groups
from hvd_syncbn.torch_impl.module import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from hvd_syncbn.torch_impl.ops import check_device_errors
from hvd_syncbn.torch_impl.recalibrate import recalibrate
from hvd_syncbn.torch_impl.state import get_state, set_state
from hvd_syncbn.torch_impl.take_part import take_part

__all__ = [
    "Diagnosis",
    "Scale",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "accumulate_statistics",
    "check_device_errors",
    "check_ranks_agree",
    "convert_sync_batchnorm",
    "diagnose",
    "fold_batchnorm",
    "freeze_batchnorm",
    "get_state",
    "groups",
    "recalibrate",
    "revert_sync_batchnorm",
    "set_state",
    "sync_batch_norm",
    "take_part",
    "unfreeze_batchnorm",
]
