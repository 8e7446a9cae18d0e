"""tf.distribute as the engine that sums packets, for TensorFlow."""

from __future__ import annotations

import sys
from typing import Any

import tensorflow as tf

PREFIX = "distributed:"  # of the current strategy, whichever that is when a gradient is taken


class Group:
    """Ranks that share a batch: the replicas of the current tf.distribute strategy."""

    key = PREFIX

    def __init__(self, process_set: Any) -> None:
        """Find the replicas.

        Raises:
            RuntimeError: a strategy of several workers is used outside of its replicas.
            ValueError: a process set of Horovod is given as well.
        """
        strategy = tf.distribute.get_strategy()
        name = type(strategy).__name__
        if process_set is not None:
            raise ValueError(
                "a layer shares its batch with the replicas of a strategy or with the ranks of Horovod, not with both: leave "
                f"out `process_set`, or the strategy. Received: process_set={process_set} in a {name}"
            )
        has_other_workers = strategy.num_replicas_in_sync > len(strategy.extended.worker_devices)
        if tf.distribute.in_cross_replica_context() and has_other_workers:
            raise RuntimeError(
                "a layer that trains outside of the replicas of a strategy has the batch of its worker only: call it in "
                f"`strategy.run` or `model.fit`. Received: {name} in cross-replica context"
            )
        # In cross-replica context one call has the whole batch.
        self.size: int = 1 if tf.distribute.in_cross_replica_context() else strategy.num_replicas_in_sync

    def sum(self, packet: Any, name: str) -> Any:
        """Return the sum of a packet over the replicas. Collectives of tf.distribute have no names."""
        if self.size == 1:
            return packet
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, packet)

    @property
    def rank(self) -> int:
        """This process is the only rank of calls outside of replicas."""
        return 0

    @property
    def ranks(self) -> list[int]:
        """As ``rank``."""
        return [0]

    def gather(self, value: object, name: str) -> list[Any]:
        """Return the values of all ranks of the group, which is this process outside of replicas."""
        if self.size > 1:
            raise RuntimeError(f"{name} cannot run inside `strategy.run`: call it outside of the replicas")
        return [value]


def is_group(process_set: Any) -> bool:
    """Whether a ``process_set`` argument stands for the replicas of the current strategy.

    None does in a strategy of several replicas, and in any strategy if Horovod is not initialized.

    Raises:
        RuntimeError: the replicas of the strategy do not train in step, or cannot run the kernels; or Horovod is initialized
            with several ranks, and the strategy has several replicas.
    """
    if not tf.distribute.has_strategy():
        return False
    strategy = tf.distribute.get_strategy()
    # By name: several classes of TensorFlow have each of these, without a common base.
    if any(kind in base.__name__ for base in type(strategy).__mro__ for kind in ("ParameterServer", "TPU")):
        raise RuntimeError(
            "synchronized batch normalization trains under strategies whose replicas run in step on CPUs or GPUs: "
            f"MirroredStrategy and MultiWorkerMirroredStrategy, or Horovod. Received: {type(strategy).__name__}"
        )
    hvd: Any = sys.modules.get("horovod.tensorflow")
    ranks = hvd.size() if hasattr(hvd, "is_initialized") and hvd.is_initialized() else 0
    if ranks > 1 and strategy.num_replicas_in_sync > 1:
        raise RuntimeError(
            "a job runs under Horovod or under a tf.distribute strategy, not under both: start it without horovodrun, or "
            f"use one device per process. Received: {ranks} ranks of Horovod, {type(strategy).__name__} of "
            f"{strategy.num_replicas_in_sync} replicas"
        )
    return strategy.num_replicas_in_sync > 1 or (process_set is None and ranks == 0)
