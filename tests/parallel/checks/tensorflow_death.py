"""A rank dies in the middle of a step, in the direction that test_tensorflow.py puts in the environment."""

from __future__ import annotations

import os
import time
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

from hvd_syncbn.keras import SyncBatchNormalization
from tests.tensorflow_tools import in_graph

DIRECTION = os.environ["DYING_DIRECTION"]


class Death:
    """The identity, until rank 1 ends in the direction asked for: as if it had been killed, with nothing cleaned up."""

    armed = False

    @staticmethod
    def end(direction: str) -> None:
        if Death.armed and hvd.rank() == 1 and direction == DIRECTION:
            os._exit(0)  # with another status, horovodrun would end everybody

    @staticmethod
    @tf.custom_gradient
    def apply(x: Any) -> Any:
        Death.end("forward")

        def gradient(dy: Any) -> Any:
            Death.end("backward")
            return dy

        return tf.identity(x), gradient


def check_survivors() -> dict[str, Any]:
    """What they see in eager code, and what a graph becomes that Horovod's elastic mode runs."""
    first, second = (SyncBatchNormalization(name=name) for name in ("first", "second"))
    values = np.random.default_rng(hvd.rank()).standard_normal((4, 3)).astype(np.float32)

    def step(between: Any = Death.apply) -> Any:
        x = tf.constant(values)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = second(between(first(x, training=True)), training=True)
        return tape.gradient(y, x, output_gradients=x)

    graph = in_graph(lambda: step(tf.identity))
    graph()
    step()
    before = [weight.numpy() for weight in (*first.weights, *second.weights)]
    Death.armed = True
    start = time.monotonic()
    try:
        step()
    except HorovodInternalError:
        seconds = time.monotonic() - start
    else:
        raise AssertionError("no error")
    # Statistics of a batch that nobody normalised stay; evaluation goes on.
    after = [weight.numpy() for weight in (*first.weights, *second.weights)]
    same = [a.tobytes() == b.tobytes() for a, b in zip(after, before, strict=True)]
    assert same == [True, True, False, False, *([True, True, DIRECTION == "forward", DIRECTION == "forward"])], same
    assert np.isfinite(first(values, training=False)).all()
    try:
        graph()
    except tf.errors.UnknownError as error:
        # How horovod.tensorflow.elastic.run knows it.
        assert "HorovodAllreduce" in error.message, error.message
    else:
        raise AssertionError("no error in the graph")
    return {"seconds": seconds}
