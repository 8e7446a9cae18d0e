"""The op library (csrc/ops.cc), loaded once and only for the TensorFlow it was built for."""

from __future__ import annotations

from functools import cache
from typing import Any

import tensorflow as tf

from hvd_syncbn import native


@cache
def library() -> Any:
    """The module of ops.

    Raises:
        ImportError: hvd-syncbn was built without TensorFlow or for another version; the message says what fixes it.
    """
    return tf.load_op_library(native.adapter("tf_impl/libhvd_syncbn_tf.so", "TensorFlow", tf.__version__))
