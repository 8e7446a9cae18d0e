"""``hvd-syncbn verify -np`` as a user runs it, on this machine; its parts are in tests/unit/test_cli.py."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from hvd_syncbn import horovod, native, vectors
from hvd_syncbn.cli import job, packets, rank, stacks
from tests.needs import need

EVERYTHING = {(split, layout) for split in vectors.SPLITS for layout in stacks.LAYOUTS}
COMMAND = [sys.executable, "-m", "hvd_syncbn.cli"]


def family(mark: str) -> list[psutil.Process]:
    """Every process that has this in its environment, ours or of a job that lost its parent."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HVD_SYNCBN_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def eventually(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def test_verify_with_every_launcher() -> None:
    """One process, horovodrun, torchrun and both strategies of tf.distribute: one sha256."""
    need("torch", "tensorflow", "horovod.torch", "horovod.tensorflow")
    command = [*COMMAND, "verify", "--launcher", "all", "-np", "4", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=560)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["reference"] == vectors.digest(*stacks.reference_stack())
    assert {result["sha256"] for result in found["results"]} == {found["reference"]}
    frameworks = {(result["framework"], result["launcher"]) for result in found["results"]}
    jobs = {(framework, launcher) for launcher, ones in job.LAUNCHERS.items() for framework in ones}
    assert frameworks == jobs | {(framework, "") for framework in horovod.FRAMEWORKS}
    for framework, launcher in jobs:
        mine = [result for result in found["results"] if (result["framework"], result["launcher"]) == (framework, launcher)]
        assert {(result["split"], result["layout"]) for result in mine} == EVERYTHING
        assert len(mine) == len(EVERYTHING) * (1 if framework == "torch" else 2) and {r["ranks"] for r in mine} == {4}


def test_without_horovod(tmp_path: Path) -> None:
    """What a user has who installs no Horovod: one process of each framework, torchrun, tf.distribute, and `doctor`."""
    need("torch")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def hide(*names: str) -> None:
        hidden = ", ".join(f"{name}=None" for name in names)
        (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update({hidden})\n")

    def run(*arguments: str) -> dict[str, Any]:
        command = [*COMMAND, *arguments, "--json"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, result.stdout + result.stderr
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    hide("horovod", "psutil")
    installed = {name for name in horovod.FRAMEWORKS if importlib.util.find_spec(name)}
    found = run("verify")
    assert {result["framework"] for result in found["results"]} == installed and found["equal"]
    assert len(found["results"]) == len(installed) * len(native.isas()) * len(stacks.LAYOUTS)
    for framework, launcher in {"torch": "torchrun", "tensorflow": "multiworker"}.items():
        if framework in installed:
            found = run("verify", "--launcher", launcher, "-np", "2")
            assert {(result["split"], result["layout"]) for result in found["results"]} == EVERYTHING
    hide("horovod", "psutil", "tensorflow", "keras")
    found = run("doctor", "--launcher", "torchrun", "-np", "3")
    assert {"tensorflow", "Horovod"} <= {
        finding["what"] for finding in found["findings"] if "not installed" in finding["found"]
    }
    assert found["controller"] == "Gloo of torch.distributed"
    assert [(packet["size"], packet["groups"]) for packet in found["packets"]] == [(2, 1)] * 3 + [(3, 1)] * 3


def test_time_limit_ends_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    need("torch")
    monkeypatch.setenv("HVD_SYNCBN_TEST", mark := f"limit {os.getpid()}")
    with pytest.raises(job.JobError, match="ended after 1 s, the time limit"):
        job.run("splits", "torch", [job.Host("localhost", 2)], limit=1)
    assert eventually(lambda: len(family(mark)) == 0, 10), family(mark)


def test_the_other_workers_end_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    need("tensorflow")
    monkeypatch.setenv("HVD_SYNCBN_TEST", mark := f"workers {os.getpid()}")
    command = [sys.executable, "-m", "hvd_syncbn.cli.rank", "replicas", "tensorflow", "100", "multiworker", "3"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert eventually(lambda: len(family(mark)) == 3, 60), family(mark)
        process.kill()
        process.wait(10)
        assert eventually(lambda: len(family(mark)) == 0, 10), family(mark)
    finally:
        job.end(process)


def test_a_host_that_is_not_there() -> None:
    need("torch")
    with pytest.raises(job.JobError, match=r"host nowhere\.invalid cannot be reached by ssh: "):
        job.run("splits", "torch", [job.Host("localhost", 1), job.Host("nowhere.invalid", 1)], limit=120)


def test_a_rank_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need("torch", "horovod.tensorflow")  # with PyTorch alone it is horovodrun that cannot import it
    (tmp_path / "torch.py").write_text("raise ImportError('no such thing')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # mpirun may leave a line without its label.
    match = r"^(rank [01] on localhost: )?(ImportError: no such thing|.*its own words: no such thing)"
    with pytest.raises(job.JobError, match=match):
        job.run("splits", "torch", [job.Host("localhost", 2)], limit=120)


def test_terminated_it_takes_its_job_along() -> None:
    mark = f"terminated {os.getpid()}"
    environment = os.environ | {"HVD_SYNCBN_TEST": mark}
    process = subprocess.Popen(
        [*COMMAND, "verify", "-np", "2"], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        # The command, the launcher and something below it.
        assert eventually(lambda: len(family(mark)) >= 4, 60), family(mark)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        assert eventually(lambda: len(family(mark)) == 0, 10), family(mark)
    finally:
        job.end(process)


def test_doctor_measures_two_ranks() -> None:
    result = subprocess.run([*COMMAND, "doctor", "-np", "2", "--json"], capture_output=True, text=True, timeout=560)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    sizes = [8 * native.packet_size(channels) for channels in rank.PACKET_CHANNELS]
    assert [packet["bytes"] for packet in found["packets"]] == sizes
    assert all(packet["size"] == 2 and 0 < packet["seconds"] < 60 for packet in found["packets"])
    hvd = horovod.load(next(name for name in horovod.FRAMEWORKS if importlib.util.find_spec(name)))
    controller = "MPI" if hvd.mpi_built() and shutil.which("mpirun") else "Gloo"  # what horovodrun takes by itself
    assert (len(found["hosts"]), found["controller"], found["group_size"]) == (2, controller, None)
    assert [breakdown["bytes"] for breakdown in found["breakdowns"]] == sizes[:2]
    for breakdown in found["breakdowns"]:
        assert tuple(breakdown["stages"]) == packets.STAGES
        assert all(0 <= middle <= late < 60 for middle, late in breakdown["stages"].values())
        assert (breakdown["ran_by_caller"] > 0.5) == (controller == "Gloo")  # patch 0039


@pytest.mark.parametrize("launcher", ["horovodrun", "torchrun"])
def test_packets_inside_groups(launcher: str) -> None:
    need("torch")
    cluster = packets.measure("torch", [job.Host("localhost", 3)], 240, launcher=launcher)
    assert (cluster.controller == "Gloo of torch.distributed") == (launcher == "torchrun")
    found = cluster.packets
    assert [(packet.size, packet.groups) for packet in found] == [(2, 1)] * 3 + [(3, 1)] * 3
