"""An elastic Keras job on one machine: two ranks, one, two again. See elastic_keras.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvd_syncbn.cli.job import end
from tests.parallel.job import ROOT

pytest.importorskip("tensorflow")
pytest.importorskip("horovod")

LIMIT = 420.0


def start(folder: Path, launcher: list[str], output: Any) -> subprocess.Popen[str]:
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        # As long as a worker that starts keeps the other one waiting.
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "240",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "2",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    folder.mkdir()
    command = [*launcher, sys.executable, "-m", "tests.parallel.checks.elastic_keras", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True)


@pytest.mark.timeout(600)
def test_a_worker_is_killed_and_comes_back(tmp_path: Path) -> None:
    launcher = [str(Path(sys.executable).parent / "horovodrun"), "--gloo", "-np", "2", "--min-np", "1", "--max-np", "2"]
    # Two hosts, since a worker that dies takes its host along; the second one may come back when
    # the first has gone on alone.
    launcher += ["-H", "localhost:1,127.0.0.1:1", "--network-interface", "lo", "--blacklist-cooldown-range", "15", "20"]
    launcher += ["--start-timeout", "300", "--elastic-timeout", "300"]
    log = tmp_path / "log"
    with open(log, "w") as output:
        jobs = [start(tmp_path / "elastic", launcher, output), start(tmp_path / "alone", [], output)]
        try:
            for job in jobs:
                job.wait(LIMIT)
        finally:
            for job in jobs:
                end(job)
    text = log.read_text()[-8000:]
    assert (tmp_path / "elastic" / "killed").exists(), text
    results = {path.name: json.loads(path.read_text()) for path in sorted((tmp_path / "elastic").glob("*.json"))}
    assert results.keys() == {"0.json", "1.json"}, text
    first, second = results.values()
    alone = json.loads((tmp_path / "alone" / "0.json").read_text())

    assert first["resets"] == [1, 2], text
    # Every batch is done, once: what was lost with the killed worker is done again by the one that is left, and no more.
    assert [step for step, _ in first["seen"]] == list(range(15)), text
    sizes = [size for _, size in first["seen"]]
    assert sizes[:7] == [2] * 7 and sizes[7] == 1 and sizes[-1] == 2, text
    assert first["size"] == second["size"] == 2 and second["resets"] == []
    assert first["state"] == second["state"] == alone["state"] == [3, 0]
    for name in ("digest", "scale", "iterations", "statistics"):
        assert first[name] == second[name], name
    for name in ("scale", "iterations", "statistics"):
        assert first[name] == alone[name], name
    assert first["scale"] == 16.0 and first["iterations"] == 15
