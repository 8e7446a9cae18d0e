"""Training under tf.distribute, as a program: ``python -m tests.parallel.checks.tensorflow_distribute REPLICAS FOLDER``.

With TF_CONFIG this is one worker of MultiWorkerMirroredStrategy, else it has REPLICAS logical CPUs for MirroredStrategy.
Writes what it found to ``FOLDER/<worker>.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

from hvd_syncbn.keras import (
    SyncBatchNormalization,
    accumulate_statistics,
    convert_sync_batchnorm,
    recalibrate,
    take_part,
)
from hvd_syncbn.tensorflow import sync_batch_norm

X = np.random.default_rng(5).standard_normal((12, 6, 3)).astype(np.float32) * np.float32(3) + np.float32(1)


def model() -> keras.Model:
    return keras.Sequential(
        [keras.Input((6, 3)), keras.layers.BatchNormalization(momentum=0.9), keras.layers.BatchNormalization(axis=1)]
    )


def one_step(strategy: tf.distribute.Strategy) -> list[Any]:
    """The moving statistics of every replica after one batch, without Horovod's callbacks and without a warning."""
    with strategy.scope():
        network = convert_sync_batchnorm(model())
        network.compile(keras.optimizers.SGD(0.1), "mse")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*several ranks.*")
        if "TF_CONFIG" in os.environ:  # Keras's `fit` fails under MultiWorkerMirroredStrategy, with its own layers as well
            count = len(X) // strategy.num_replicas_in_sync
            part = lambda context: tf.constant(X[count * context.replica_id_in_sync_group :][:count])  # noqa: E731
            values = strategy.experimental_distribute_values_from_function(part)
            strategy.run(lambda x: network(x, training=True), (values,))
        else:
            network.fit(X, X, batch_size=len(X), verbose=0)
    variables = [v.value for layer in network.layers for v in (layer.moving_mean, layer.moving_variance)]
    return [[part.numpy().tolist() for part in strategy.experimental_local_results(v)] for v in variables]


def warnings_of_plain_layers(strategy: tf.distribute.Strategy) -> list[str]:
    with strategy.scope():
        network = keras.Sequential([keras.Input((6, 3)), SyncBatchNormalization(), keras.layers.BatchNormalization()])
        network.compile("sgd", "mse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        network.fit(X, X, batch_size=len(X), verbose=0)
    return [str(warning.message) for warning in caught if "several ranks" in str(warning.message)]


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def errors(strategy: tf.distribute.Strategy) -> dict[str, str]:
    """What wrong uses raise."""
    with strategy.scope():
        layer = SyncBatchNormalization()
        layer.build((None, 3))
        own = SyncBatchNormalization(process_set=(0, 1))
        own.build((None, 3))

    def one_value() -> None:
        """One sample on one replica, none on the others."""
        first = lambda context: tf.constant(X[: int(context.replica_id_in_sync_group == 0), 0])  # noqa: E731
        values = strategy.experimental_distribute_values_from_function(first)
        strategy.run(lambda x: layer(x, training=True), (values,))

    def outside() -> None:
        with strategy.scope():
            layer(X[:, 0], training=True)

    def tpus(kind: type) -> None:
        """Nothing but the class, as such a strategy needs a TPU."""
        of_tpus = object.__new__(kind)
        distribute = mock.patch.multiple(tf.distribute, has_strategy=lambda: True, get_strategy=lambda: of_tpus)
        with distribute:
            layer(X[:, 0], training=True)

    def inside() -> None:
        strategy.run(lambda: recalibrate(convert_sync_batchnorm(model()), [X]))

    return {
        "process_set": raised(lambda: strategy.run(lambda: own(X[:, 0], training=True))),
        "one value": raised(one_value),
        "outside": raised(outside),
        "collective inside": raised(inside),
        "synchronized": raised(lambda: SyncBatchNormalization(synchronized=True)),
        "TPUs": raised(lambda: tpus(tf.distribute.TPUStrategy)),
        "TPUs, experimental": raised(lambda: tpus(tf.distribute.experimental.TPUStrategy)),
    }


def errors_under_servers() -> dict[str, str]:
    """What training raises under a ParameterServerStrategy, whose worker and server run in this process."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(2)]
        jobs = {job: [f"localhost:{s.getsockname()[1]}"] for job, s in zip(("worker", "ps"), sockets, strict=True)}
    cluster = tf.train.ClusterSpec(jobs)
    servers = [tf.distribute.Server(cluster, job_name=job, protocol="grpc") for job in jobs]
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    with strategy.scope():
        network = convert_sync_batchnorm(model())

    def scheduled() -> None:
        coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
        coordinator.schedule(tf.function(lambda: strategy.run(lambda: network(X, training=True))))
        coordinator.join()

    def in_scope() -> None:
        with strategy.scope():
            network(X, training=True)

    found = {"scheduled": raised(scheduled), "in scope": raised(in_scope)}
    assert len(servers) == 2  # they end with the process
    return found


def other_channels(strategy: tf.distribute.Strategy, worker: int) -> str:
    """What a graph raises whose packets have another size on each worker; TensorFlow's collectives end with it.

    A function, because the variables of a layer cannot even be created then.
    """
    zeros = tf.zeros(3 + worker)
    normalize = lambda x: sync_batch_norm(x, None, None, zeros, zeros, training=True)  # noqa: E731
    return raised(tf.function(lambda: strategy.run(normalize, (tf.ones((4, 3 + worker)),)), autograph=False))


def recalibrated(strategy: tf.distribute.Strategy) -> list[Any]:
    """`recalibrate` outside of the replicas of one process, on mirrored variables."""
    with strategy.scope():
        network = convert_sync_batchnorm(model())
        recalibrate(network, [X[:4], X[4:]])
    return [v.numpy().tolist() for layer in network.layers for v in (layer.moving_mean, layer.moving_variance)]


def took_part(strategy: tf.distribute.Strategy) -> list[Any]:
    """The moving statistics of every replica, two micro-batches together, where replica 0 has no input."""
    with strategy.scope():
        layer = SyncBatchNormalization(momentum=0.9)
        layer.build((None, 3))
        accumulate_statistics(layer, 2)
    count = len(X) // strategy.num_replicas_in_sync

    def step(x: Any) -> Any:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        with tf.GradientTape() as tape:
            has_input = tf.get_static_value(replica) != 0
            loss = tf.reduce_sum(layer(x, training=True) ** 2) if has_input else take_part(layer)
        return tape.gradient(loss, [v.value for v in layer.trainable_variables])

    for half in (X[:, 0], X[:, 1]):

        def part(context: tf.distribute.distribute_lib.ValueContext, half: np.ndarray = half) -> Any:
            return tf.constant(half[count * context.replica_id_in_sync_group :][:count])

        strategy.run(step, (strategy.experimental_distribute_values_from_function(part),))
    return [
        [part.numpy().tolist() for part in strategy.experimental_local_results(v.value)]
        for v in (layer.moving_mean, layer.moving_variance)
    ]


def main() -> None:
    replicas, folder = int(sys.argv[1]), Path(sys.argv[2])
    config = json.loads(os.environ.get("TF_CONFIG", "{}"))
    if config:
        strategy: tf.distribute.Strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    assert strategy.num_replicas_in_sync == replicas
    found: dict[str, Any] = {}
    try:
        found["fit"] = one_step(strategy)
        if not config:
            found["fit on one device"] = one_step(tf.distribute.OneDeviceStrategy("CPU:0"))
        found["horovod"] = sorted(name for name in sys.modules if name.startswith("horovod."))
        found["errors"] = errors(strategy)
        if config:
            found["other channels"] = other_channels(strategy, config["task"]["index"])
        else:
            found["plain"] = warnings_of_plain_layers(strategy)
            found["recalibrated"] = recalibrated(strategy)
            found["took part"] = took_part(strategy)
            found["servers"] = errors_under_servers()  # connects TensorFlow to another cluster: the last
    except BaseException:
        found["failure"] = traceback.format_exc()
    (folder / f"{config['task']['index'] if config else 0}.json").write_text(json.dumps(found))
    os._exit(1 if "failure" in found else 0)


if __name__ == "__main__":
    main()
