"""Training under tf.distribute. The bytes of every split are compared by test_cli.py, with `hvd-syncbn verify`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_syncbn.cli.job import end
from tests.needs import need
from tests.parallel.job import ROOT, rank_environment


def run(replicas: int, workers: int, folder: Path) -> list[dict[str, Any]]:
    """What every worker's process found."""
    need("tensorflow")
    command = [sys.executable, "-m", "tests.parallel.checks.tensorflow_distribute", str(replicas), str(folder)]
    environments: list[dict[str, str]] = [{}]
    if workers > 1:
        sockets = [socket.create_server(("localhost", 0)) for _ in range(workers)]
        cluster = {"worker": [f"localhost:{s.getsockname()[1]}" for s in sockets]}
        for s in sockets:
            s.close()
        tasks = [{"cluster": cluster, "task": {"type": "worker", "index": i}} for i in range(workers)]
        environments = [{"TF_CONFIG": json.dumps(task)} for task in tasks]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=rank_environment() | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for env in environments
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            end(process)
    results = [folder / f"{worker}.json" for worker in range(workers)]
    assert all(path.exists() for path in results), b"\n".join(printed)[-8000:].decode()
    found = [json.loads(path.read_text()) for path in results]
    for one in found:
        assert "failure" not in one, one["failure"]
    return found


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(4, 1, tmp_path_factory.mktemp("replicas"))


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(2, 2, tmp_path_factory.mktemp("workers"))


@pytest.fixture(params=["replicas", "workers"])
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = request.getfixturevalue(request.param)
    return results


def test_training_needs_no_callback(found: list[dict[str, Any]], replicas: list[dict[str, Any]]) -> None:
    """After one batch the moving statistics of every replica are those of the whole batch on one device."""
    for worker in found:
        assert worker["horovod"] == []
        for values, (expected,) in zip(worker["fit"], replicas[0]["fit on one device"], strict=True):
            assert all(value == expected for value in values)


def test_a_replica_with_nothing(replicas: list[dict[str, Any]]) -> None:
    """Moving statistics of two micro-batches on the other replicas, as of one batch in one process."""
    import tensorflow as tf

    from hvd_syncbn.tensorflow import sync_batch_norm
    from tests.parallel.checks.tensorflow_distribute import X

    samples = tf.constant(np.concatenate([X[3:, 0], X[3:, 1]]))
    ones, zeros = tf.ones(3), tf.zeros(3)
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        _, *expected = sync_batch_norm(samples, ones, zeros, zeros, ones, training=True, momentum=0.9)
    for values, statistic in zip(replicas[0]["took part"], expected, strict=True):
        for value in values:
            assert np.array(value, np.float32).tobytes() == statistic.numpy().tobytes()


UNSUPPORTED = "trains under strategies whose replicas run in step"
ERRORS = {
    "process_set": "shares its batch with the replicas of a strategy or with the ranks of Horovod, not with both",
    "one value": "Expected more than 1 value per channel when training",
    "collective inside": "recalibrate cannot run inside `strategy.run`",
    "synchronized": "leave `synchronized` out",
    "TPUs": UNSUPPORTED,
    "TPUs, experimental": UNSUPPORTED,
}


@pytest.mark.parametrize("wrong", ERRORS)
def test_wrong_uses(found: list[dict[str, Any]], wrong: str) -> None:
    for worker in found:
        assert ERRORS[wrong] in worker["errors"][wrong]


def test_parameter_servers(replicas: list[dict[str, Any]]) -> None:
    for place, message in replicas[0]["servers"].items():
        assert UNSUPPORTED in message, place


def test_workers_with_other_channels(workers: list[dict[str, Any]]) -> None:
    """In a graph, as in `fit`: an error on every worker."""
    for worker in workers:
        assert "Shape mismatch in the collective" in worker["other channels"], worker["other channels"]


def test_outside_of_replicas(found: list[dict[str, Any]]) -> None:
    """One process has the whole batch there; a worker of several has not."""
    for worker in found:
        outside = worker["errors"]["outside"]
        assert "outside of the replicas" in outside if len(found) > 1 else outside == "nothing"
    if len(found) == 1:
        assert "plain layers ['batch_normalization" in found[0]["plain"][0] and len(found[0]["plain"]) == 1
        assert np.isfinite(np.array(found[0]["recalibrated"][0])).all()
