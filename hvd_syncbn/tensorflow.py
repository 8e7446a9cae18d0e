"""Synchronized batch normalization for TensorFlow. See ``sync_batch_norm``."""

from hvd_syncbn.tf_impl import ops
from hvd_syncbn.tf_impl.functional import sync_batch_norm
from hvd_syncbn.tf_impl.groups import groups

__all__ = ["groups", "sync_batch_norm"]

ops.library()  # report a missing or stale build on import, not in the first training step
