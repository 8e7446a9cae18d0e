"""A rank dies in the middle of a step."""

from __future__ import annotations

import os
import signal
import time

import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

from tests.tensorflow_tools import in_graph, step, train


def check_a_peer_dies() -> list[str]:
    """What the survivor sees in eager code, and what a graph that Horovod's elastic mode runs becomes."""
    data = step((4, 3))
    graph = in_graph(lambda: train(data, name="graph"))
    train(data, name="eager")
    graph()
    hvd.allgather_object(None)
    if hvd.rank() == 1:
        os.closerange(3, 1024)  # to the others it is dead; horovodrun does not notice yet
        time.sleep(20)
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from horovodrun, before we are through
    seen = []
    for act in (lambda: train(data, name="eager"), graph):
        try:
            act()
        except HorovodInternalError as error:
            seen.append(type(error).__name__)
        except tf.errors.UnknownError as error:
            # How horovod.tensorflow.elastic.run knows it.
            assert "HorovodAllreduce" in error.message, error.message
            seen.append(type(error).__name__)
    return seen
