"""A tape that stops on one rank; see test_gradients.py."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

from hvd_syncbn.keras import SyncBatchNormalization


def check_a_tape_that_stops() -> dict[str, Any]:
    """The others wait for its backward pass until Horovod gives up, and all are told."""
    layer = SyncBatchNormalization(name="stopped")
    x = tf.reshape(tf.range(24.0), (2, 4, 3))
    gave_up = Path(os.environ["STALL_FOLDER"]) / "gave_up"
    start = time.monotonic()
    try:
        with tf.GradientTape() as tape:
            if hvd.rank() == 0:
                with tape.stop_recording():
                    layer(x, training=True)
            else:
                loss = tf.reduce_sum(layer(x, training=True) ** 2)
        if hvd.rank() == 0:
            while not gave_up.exists() and time.monotonic() < start + 60:
                time.sleep(0.05)
            layer(x, training=True)
        else:
            tape.gradient(loss, layer.trainable_variables)
    except (HorovodInternalError, tf.errors.UnknownError) as error:
        gave_up.touch()
        return {"error": str(error), "seconds": time.monotonic() - start}
    finally:
        hvd.shutdown()
    raise AssertionError("no error")
