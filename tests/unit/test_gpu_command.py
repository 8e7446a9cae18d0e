"""`make gpu`: a stage that fails, hangs or raises stops no other one, and its output is kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import carried, machine, processes, stages
from benchmarks.gpu.processes import FAILED, NOT_RUN, OVER_TIME, PASSED, Result, Stage
from hvd_syncbn import horovod_build
from tests.needs import need

NAMES = ["build", "test", "speed", "ranks", "sanitize", "profile"]


def run(monkeypatch: pytest.MonkeyPatch, out: Path, **outcomes: Result | Exception | Callable[[Stage], Result]) -> Any:
    """The command's exit status and summary where stages end so; those not named pass."""

    def stage(name: str, given: Stage) -> Result:
        outcome = outcomes.get(name, Result(PASSED, "well"))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome if isinstance(outcome, Result) else outcome(given)

    fakes = {
        name: ((lambda given, name=name: stage(name, given)), limit)  # type: ignore[misc]
        for name, (_, limit) in command.STAGES.items()
    }
    monkeypatch.setattr(command, "STAGES", fakes)
    monkeypatch.setattr(command, "run", lambda *arguments: real_run(*arguments, logs=out / "logs"))
    status = command.main(["--out", str(out)])
    summary = json.loads((out / "summary.json").read_text())["stages"]
    return status, {name: [row["status"], row["what"]] for name, row in summary.items()}


real_run = command.run


def test_all_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, summary = run(monkeypatch, tmp_path)
    assert status == 0 and {row[0] for row in summary.values()} == {PASSED}
    assert list(summary) == NAMES
    assert "passed" in capsys.readouterr().out
    assert "profile   passed" in (tmp_path / "summary.txt").read_text()


def test_the_plan_fits_the_time_on_a_lent_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--plan"]) == 0
    *limits, together = [int(line.split()[-2]) for line in capsys.readouterr().out.splitlines()]
    assert len(limits) == len(NAMES) and sum(limits) == together < command.TOTAL_S


def test_nothing_runs_without_a_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, summary = run(monkeypatch, tmp_path, build=Result(FAILED, "x.cu:1: error: y"))
    assert status == 1 and summary["build"] == [FAILED, "x.cu:1: error: y"]
    assert all(row == [NOT_RUN, "build did not pass"] for name, row in summary.items() if name != "build")


@pytest.mark.parametrize("outcome", [Result(FAILED, "1 of 9 tests failed"), OSError("no space")], ids=["fails", "raises"])
def test_a_failed_stage_stops_no_other(outcome: Result | Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, summary = run(monkeypatch, tmp_path, test=outcome)
    assert status == 1
    assert summary.pop("test") == [FAILED, "1 of 9 tests failed" if isinstance(outcome, Result) else "OSError: no space"]
    assert {row[0] for row in summary.values()} == {PASSED}


def test_what_could_not_run_did_not_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, summary = run(monkeypatch, tmp_path, test=Result(NOT_RUN, "all 172 tests were skipped"))
    assert status == 2 and summary["speed"][0] == PASSED


def packed(out: Path) -> dict[str, str]:
    with tarfile.open(out / "logs.tar.gz") as archive:
        return {member.name: archive.extractfile(member).read().decode() for member in archive.getmembers()}  # type: ignore[union-attr]


def test_every_stages_output_is_packed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the run is ended in the stage behind it."""

    def build(stage: Stage) -> Result:
        stage.run("build.log", "-c", "print('compiled')")
        (stage.logs / "large").write_bytes(b"x" * (command._ARCHIVE_BYTES + 1))
        return Result(PASSED, "well")

    def test(stage: Stage) -> Result:
        assert json.loads((tmp_path / "summary.json").read_text())["stages"]["test"]["what"] == "not reached"
        assert packed(tmp_path) == {"logs/build.log": "compiled\n"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, build=build, test=test)
    assert packed(tmp_path) == {"logs/build.log": "compiled\n"}
    assert json.loads((tmp_path / "summary.json").read_text())["left_out"] == ["large"]

    def fail(stage: Stage) -> Result:
        return Result(FAILED, f"status {stage.run('test.log', '-c', 'raise SystemExit(print(42) or 3)')}")

    assert run(monkeypatch, tmp_path, test=fail)[1]["test"] == [FAILED, "status 3"]
    assert "--- the end of test.log\n42" in capsys.readouterr().out


def test_a_program_over_its_time_is_ended_with_its_descendants(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], start_new_session=True)\n"
        "print(child.pid)\n"
        "time.sleep(300)"
    )
    stage = Stage(tmp_path, None, 300)
    start = time.monotonic()
    assert stage.run("hangs.log", "-c", code, limit=3.0) == OVER_TIME
    assert time.monotonic() - start < 60
    child = int((tmp_path / "hangs.log").read_text())  # printed, though the program did not end by itself
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2:3]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stage_has_the_time_that_is_left(tmp_path: Path) -> None:
    assert Stage(tmp_path, None, 0).run("late.log", "-c", "import time; time.sleep(300)") == OVER_TIME


def test_unused_time_is_added_to_later_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left = []

    def record(stage: Stage) -> Result:
        left.append(stage.left())
        return Result(PASSED, "well")

    run(monkeypatch, tmp_path, build=record, test=record)
    limits = [limit for _, limit in command.STAGES.values()]
    assert left[1] == pytest.approx(limits[0] + limits[1], abs=10)


CASES = {"passed": "<testcase name='a'/>", "skipped": "<testcase name='b'><skipped message='needs a GPU'/></testcase>"}
CASES["failed"] = "<testcase name='c'><failure message='1 != 2'/></testcase>"
SO_FAR = "[gw0] [ 50%] PASSED tests/gpu/test_a.py::test_1 \n[gw1] [ 99%] FAILED tests/gpu/test_a.py::test_2 \n"


@pytest.mark.parametrize(
    ("cases", "status", "expected"),
    [
        (["passed"] * 3, 0, Result(PASSED, "3 tests")),
        (["passed", "skipped"], 0, Result(PASSED, "1 tests; 1 skipped: needs a GPU")),
        (["skipped"] * 2, 0, Result(NOT_RUN, "all 2 tests were skipped: needs a GPU")),
        (["passed", "failed"], 1, Result(FAILED, "1 of 2 tests failed (exit status 1), first c: {log}")),
        (["passed"], 3, Result(FAILED, "0 of 1 tests failed (exit status 3), first ?: {log}")),  # pytest itself failed
        (None, OVER_TIME, Result(FAILED, "pytest ended early (over its time limit), 1 tests had passed and 1 failed: {log}")),
    ],
)
def test_tests(cases: list[str] | None, status: int, expected: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "test.log"

    def pytest_ran(*_arguments: Any, **_options: Any) -> int:
        log.write_text(SO_FAR)
        if cases is not None:
            text = "".join(CASES[case] for case in cases)
            log.with_suffix(".xml").write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
        return status

    stage = Stage(tmp_path, None, 100)
    monkeypatch.setattr(stages, "look", lambda _: {"missing": []})
    monkeypatch.setattr(stage, "run", pytest_ran)
    assert stages.test(stage) == expected._replace(what=expected.what.format(log=log))


def test_a_sanitizer_that_could_not_run_is_run_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Found errors are not looked for twice."""
    stage = Stage(tmp_path, None, 100)
    monkeypatch.setattr(stages, "look", lambda _: HERE | {"tools": {"compute-sanitizer": "/bin/sanitizer"}})
    statuses = {"memcheck.log": [0], "racecheck.log": [9], "synccheck.log": [1, 0], "initcheck.log": [1, 1]}
    statuses["memcheck_of_PyTorch.log"] = [OVER_TIME]
    monkeypatch.setattr(stage, "run", lambda log, *_, **__: statuses[log].pop(0))
    result = stages.sanitize(stage)
    assert result.status == FAILED and not any(statuses.values())
    assert "racecheck: found errors" in result.what and "memcheck of PyTorch: over its time limit" in result.what
    assert "initcheck: exit status 1" in result.what and result.what.endswith("clean: memcheck, synccheck")


def test_a_broken_gpu_context_fails_one_test(tmp_path: Path) -> None:
    """The conftest of tests/gpu ends the process, and pytest-xdist replaces it."""
    need("torch")
    folder = tmp_path / "tests"
    folder.mkdir()
    shutil.copy(Path(__file__).parents[1] / "gpu" / "conftest.py", folder)
    (tmp_path / "sitecustomize.py").write_text(
        "import types, sys\n"
        "broken = []\n"
        "def synchronize():\n"
        "    if broken: raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "cuda = types.SimpleNamespace(is_available=lambda: True, synchronize=synchronize, broken=broken)\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)\n"
        "sys.modules['benchmarks.gpu.size_one'] = types.SimpleNamespace(modules=lambda: {})\n"
    )
    (folder / "test_them.py").write_text(
        "import os, torch\n"
        "from hvd_syncbn import native\n"
        "native.has_cuda = lambda: True\n"
        "def test_1(): torch.cuda.synchronize(); torch.cuda.broken.append(1)\n"
        "def test_2(): torch.cuda.synchronize()\n"
        "def test_3(): torch.cuda.synchronize()\n"
    )
    root = Path(__file__).parents[2]
    environment = processes.python_environment([]) | {"PYTHONPATH": f"{tmp_path}:{root}", "PATH": "/usr/bin:/bin"}
    options = ["-p", "no:cacheprovider", "-n", "1", "-v", "-c", "/dev/null", "--rootdir", str(tmp_path), str(folder)]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert "1 failed" in result.stdout and "3 passed" in result.stdout, result.stdout + result.stderr
    assert "test_1 broke the GPU context" in result.stdout + result.stderr


HERE = {"torch": "2.11.0+cu130", **machine.python(), "gpu": "NVIDIA H200", "capability": "90"}


@pytest.mark.sources
def test_carried_libraries_are_for_one_machine(tmp_path: Path) -> None:
    assert carried.reason_against(None, HERE) == "nothing was carried"
    assert carried.reason_against(tmp_path, HERE) == f"{tmp_path} has no libraries"
    built = {"torch": "2.11.0+cu130", **machine.python(), "architecture": "90", "sources": carried.digest()}
    for name, value in {"": "", "torch": "2.11.0+cpu", "python": "cpython-39", "architecture": "80", "sources": "0"}.items():
        (tmp_path / "carried.json").write_text(json.dumps(built | ({name: value} if name else {})))
        reason = carried.reason_against(tmp_path, HERE)
        assert (name in reason and value in reason) if name else reason == ""


def test_carried_horovod_is_installed_or_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The wheel where it can be loaded; else a build beside the stages, of the source that was carried."""
    monkeypatch.setattr(stages, "HOROVOD", tmp_path / "horovod")
    monkeypatch.setattr(stages, "BUILD", tmp_path)
    here = HERE | {"horovod": False}
    calls: list[tuple[str, ...]] = []
    stage = Stage(tmp_path, tmp_path / "carried", 100)

    def ran(log: str, *arguments: str, **_options: Any) -> int:
        calls.append((log, *arguments))
        return status

    started = processes.Background(subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]), tmp_path / "log")
    monkeypatch.setattr(stage, "run", ran)
    monkeypatch.setattr(stage, "start", lambda *arguments, **options: calls.append((*arguments, options)) or started)
    (tmp_path / "horovod").mkdir()
    assert stages._prepare_horovod(stage, here | {"horovod": True}) == "Horovod is installed" and not calls
    assert not (tmp_path / "horovod").exists()  # or an earlier run's would come before it
    assert "not carried" in stages._prepare_horovod(Stage(tmp_path, None, 1), here)
    (tmp_path / "carried" / "wheels").mkdir(parents=True)
    (tmp_path / "carried" / "wheels" / "horovod-1.whl").touch()
    status = 0
    assert stages._prepare_horovod(stage, here) == "Horovod was carried"
    assert calls[0][:4] == ("horovod_install.log", "-m", "pip", "install") and len(calls) == 2
    assert "import init" in calls[1][-1]  # horovod.torch can be imported without its library
    status = 1
    assert "being built" in stages._prepare_horovod(stage, here)
    assert calls[-1][1:3] == ("-m", "hvd_syncbn.horovod_build")
    assert calls[-1][-1]["environment"]["HOROVOD_BUILD_CUDA_CC_LIST"] == "90"  # type: ignore[index]
    # What has failed there is what the ranks stage says.
    monkeypatch.setattr(stages, "look", lambda _: here)
    result = stages.ranks(stage)
    assert result.status == FAILED and "Horovod was not built (exit status 3)" in result.what
    monkeypatch.setattr(stages, "_horovod", None)
    assert stages.ranks(stage).status == NOT_RUN


def test_a_build_that_fails_says_the_first_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stages, "SITE", tmp_path / "site")
    stage = Stage(tmp_path, None, 100)
    here = HERE | {"missing": [], "horovod": True, "tools": dict.fromkeys(("cmake", "ninja", "g++", "nvcc"), "/bin/x")}
    monkeypatch.setattr(stages, "look", lambda _: here)
    command_line = ["-c", "print('x.cu(1): error: y'); raise SystemExit(2)"]
    monkeypatch.setattr(carried, "configure", lambda *_: [command_line])
    result = stages.build(stage)
    assert result.status == FAILED and "x.cu(1): error: y" in result.what and "nothing was carried" in result.what
    here["tools"]["nvcc"] = None
    result = stages.build(stage)
    assert result.status == NOT_RUN and "nvcc (the CUDA compiler" in result.what
    # Only the tests need it.
    here["missing"] = ["xdist"]
    assert stages.test(stage) == Result(NOT_RUN, "this machine lacks the Python modules xdist")


@pytest.mark.sources
def test_what_is_not_compiled_is_laid_out_whole(tmp_path: Path) -> None:
    stages.lay_out(tmp_path)
    for path in ("__init__.py", "py.typed", "torch_impl/ops.py", "tf_impl/keras/layer.py"):
        assert (tmp_path / path).exists(), path
    patches = sorted(path.name for path in (tmp_path / "horovod_build" / "patches").iterdir())
    assert patches == [patch.name for patch in horovod_build.patches()]


def test_without_a_gpu_nothing_is_a_traceback(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    stage = Stage(tmp_path, None, 100)
    for name in ("speed", "ranks", "sanitize", "profile"):
        result = command.STAGES[name][0](stage)
        assert result == Result(NOT_RUN, f"needs an NVIDIA GPU, and PyTorch {torch.__version__} sees none")
    assert (tmp_path / "machine.json").exists()


@pytest.mark.slow
@pytest.mark.sources
@pytest.mark.timeout(1500)
def test_rehearsal(tmp_path: Path) -> None:
    """Every stage, against stand-ins for the GPU and its tools."""
    need("torch", "horovod.torch")
    if shutil.which("g++") is None:
        pytest.skip("needs g++ for the emulator")
    command_line = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path)]
    with subprocess.Popen(
        command_line, cwd=processes.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=1400)
        finally:
            processes.end(process)
    rows = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(NAMES, PASSED), said
    assert {"logs/test.xml", "logs/speed.json", "logs/network.json", "logs/profile.txt"} <= packed(tmp_path).keys()
