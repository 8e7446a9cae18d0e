"""The templates of examples/templates on two ranks: see templates.py."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hvd_syncbn.cli.job import end
from tests.needs import need
from tests.parallel import fork_server
from tests.parallel.job import ROOT, rank_environment

LIMIT = 240.0
pytestmark = pytest.mark.timeout(800)


def execute(*command: str, status: int | None = None) -> str:
    """All that was printed."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=rank_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        end(process)
    assert status in (None, process.returncode), output[-8000:]
    return output


def contents(path: Path) -> dict[str, bytes]:
    """Every array of a checkpoint, by name."""
    found: dict[str, bytes] = {}
    if path.suffix == ".pt":
        import torch

        def add(name: str, value: Any) -> None:
            if isinstance(value, dict):
                for key, below in value.items():
                    add(f"{name}/{key}", below)
            elif isinstance(value, torch.Tensor):
                found[name] = value.numpy().tobytes()
            else:
                found[name] = repr(value).encode()

        add("", torch.load(path, weights_only=True))
    else:
        import h5py

        def visit(name: str, value: Any) -> None:
            if isinstance(value, h5py.Dataset):
                found[name] = value[()].tobytes()

        with h5py.File(path) as file:
            file.visititems(visit)
            found["epochs"] = bytes([file.attrs["epochs"]])
    return found


@dataclass(frozen=True)
class Runs:
    """What two ranks, and one process after them, have left and said."""

    folder: Path
    checkpoint: str
    model: str
    plain: str
    elastic: str
    alone: str

    def contents(self, run: str) -> dict[str, bytes]:
        return contents(self.folder / run / "0" / self.checkpoint)


@pytest.fixture(scope="module", params=["pytorch", "keras"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    framework = request.param
    need(*{"pytorch": ("torch", "horovod.torch"), "keras": ("keras", "horovod.tensorflow")}[framework], "sklearn")
    folder = tmp_path_factory.mktemp(framework)
    job = ["tests.parallel.checks.templates", framework, str(folder)]
    horovodrun = [str(Path(sys.executable).parent / "horovodrun"), "--gloo", "-np", "2"]
    forked = fork_server.command({"pytorch": "torch", "keras": "tensorflow"}[framework], rank_environment())
    plain = execute(*horovodrun, "-H", "localhost:2", *forked, *job, "plain")
    hosts = ["--min-np", "1", "-H", "localhost:1,127.0.0.1:1", "--network-interfaces", "lo"]
    elastic = execute(*horovodrun, *hosts, sys.executable, "-m", *job, "elastic")
    script = str(ROOT / "examples" / "templates" / f"train_{framework}.py")
    shutil.copytree(folder / "whole" / "0", folder / "alone" / "0")
    alone = execute(sys.executable, script, "--epochs", "2", "--resume", "--out", str(folder / "alone" / "0"), status=0)
    names = {"pytorch": ("checkpoint.pt", "model.pt"), "keras": ("checkpoint.weights.h5", "model.keras")}
    return Runs(folder, *names[framework], plain, elastic, alone)


def said(output: str, title: str) -> tuple[float, str]:
    """The loss of the test data that was printed first under this title, and the rest of the line."""
    found = re.search(rf"{title}: loss ([\d.]+), (.*)", output)
    assert found, output[-8000:]
    return float(found[1]), found[2]


def test_rank_0_writes_and_nobody_else(runs: Runs) -> None:
    written = {str(path.relative_to(runs.folder)) for path in runs.folder.glob("*/*/*")}
    both = {
        f"{run}/0/{name}" for run in ("whole", "amp", "killed", "elastic", "alone") for name in (runs.checkpoint, runs.model)
    }
    assert written == both, runs.plain[-4000:] + runs.elastic[-4000:]


def test_a_killed_run_resumes_to_the_same_bytes(runs: Runs) -> None:
    """And in an elastic job, as nobody dies in it."""
    assert "Process 1 exit with status code 137" in runs.plain  # SIGKILL
    assert "final result" in runs.plain and runs.plain.count("final result") == 2, runs.plain[-8000:]
    assert "resuming" in runs.elastic, runs.elastic[-8000:]
    whole = runs.contents("whole")
    assert len(whole) > 20
    assert runs.contents("killed") == whole
    assert said(runs.elastic, "epoch 2/2") == said(runs.plain, "epoch 2/2") == said(runs.plain, "final result")


def test_evaluation_is_that_of_one_process(runs: Runs) -> None:
    """357 images on two ranks: uneven shares."""
    (loss, right), (alone, right_alone) = said(runs.plain, "final result"), said(runs.alone, "final result")
    assert right == right_alone
    # The framework's products of other numbers of images round differently, and the last digit printed is 1e-6.
    assert abs(loss - alone) < 3e-6


def test_mixed_precision_and_recalibration(runs: Runs) -> None:
    loss, _ = said(runs.plain, "epoch 1/1")
    assert loss < 0.5
    assert runs.contents("amp").keys() == runs.contents("whole").keys()
    assert runs.plain.count("epoch 1/1") == 1 and runs.plain.count("final result") == 2


def test_an_elastic_job_goes_on_alone(runs: Runs) -> None:
    assert "Process 1 exit with status code 137" in runs.elastic  # SIGKILL, in the first epoch
    assert runs.elastic.count("epoch 1/2") == 1 and runs.elastic.count("final result") == 2, runs.elastic[-8000:]
    loss, _ = said(runs.elastic, "epoch 1/2")
    assert loss < 0.5
    assert runs.contents("elastic").keys() == runs.contents("whole").keys()


def test_the_model_needs_nothing_of_ours(runs: Runs) -> None:
    path = runs.folder / "whole" / "0" / runs.model
    if path.suffix == ".pt":
        assert len(contents(path)) == 20  # tensors and nothing else, or `weights_only` would have refused
    else:
        with zipfile.ZipFile(path) as file:
            config = file.read("config.json").decode()
        assert config.count('"BatchNormalization"') == 3 and "hvd_syncbn" not in config
