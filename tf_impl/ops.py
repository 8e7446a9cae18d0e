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
    folder = native.find("tf_impl/libhvd_syncbn_tf.so").parent
    built_for = (folder / "built_for.txt").read_text()
    if built_for != tf.__version__:
        raise ImportError(
            f"hvd-syncbn was built for TensorFlow {built_for}, and this is {tf.__version__}. Run `make setup` in its checkout, "
            "or reinstall it with `pip install --no-build-isolation --no-deps`."
        )
    return tf.load_op_library(str(folder / "libhvd_syncbn_tf.so"))


@tf.RegisterGradient("HvdSyncbnBackwardMoments")
@tf.RegisterGradient("HvdSyncbnBackwardApply")
def _second_derivative(op: Any, *_: Any) -> None:
    raise RuntimeError("hvd_syncbn's batch normalization can be differentiated once, not twice, in training mode")
