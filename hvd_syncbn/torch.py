"""Synchronized batch normalization for PyTorch. See ``SyncBatchNorm``."""

from hvd_syncbn.torch_impl.convert import convert_sync_batchnorm, revert_sync_batchnorm
from hvd_syncbn.torch_impl.drift import check_ranks_agree
from hvd_syncbn.torch_impl.fold import Scale, fold_batchnorm
from hvd_syncbn.torch_impl.freeze import freeze_batchnorm, unfreeze_batchnorm
from hvd_syncbn.torch_impl.functional import sync_batch_norm
from hvd_syncbn.torch_impl.groups import groups
from hvd_syncbn.torch_impl.module import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from hvd_syncbn.torch_impl.ops import check_device_errors
from hvd_syncbn.torch_impl.recalibrate import recalibrate
from hvd_syncbn.torch_impl.state import get_state, set_state

__all__ = [
    "Scale",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "check_device_errors",
    "check_ranks_agree",
    "convert_sync_batchnorm",
    "fold_batchnorm",
    "freeze_batchnorm",
    "get_state",
    "groups",
    "recalibrate",
    "revert_sync_batchnorm",
    "set_state",
    "sync_batch_norm",
    "unfreeze_batchnorm",
]
