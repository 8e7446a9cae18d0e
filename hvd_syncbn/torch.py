"""PyTorch's face: ``from hvd_syncbn.torch import SyncBatchNorm``."""

from hvd_syncbn.torch_impl.convert import convert_sync_batchnorm, revert_sync_batchnorm
from hvd_syncbn.torch_impl.functional import sync_batch_norm
from hvd_syncbn.torch_impl.module import SyncBatchNorm

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm", "revert_sync_batchnorm", "sync_batch_norm"]
