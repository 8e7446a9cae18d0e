"""`make gpu` says of every stage what became of it, also where there is no GPU. Its stages are run on a machine with one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import build
from benchmarks.gpu.build import FAILED, NOT_RUN, PASSED, Result
from hvd_syncbn import horovod_build


def run(monkeypatch: pytest.MonkeyPatch, out: Path, **results: Result | Exception) -> tuple[int, dict[str, list[str]]]:
    """The command's exit status and summary where stages end so; those not named pass."""

    def stage(name: str) -> Result:
        result = results.get(name, Result(PASSED, "well"))
        if isinstance(result, Exception):
            raise result
        return result

    stages = {
        name: (lambda _out, _carried, name=name: stage(name), needs)  # type: ignore[misc]
        for name, (_, needs) in command.STAGES.items()
    }
    monkeypatch.setattr(command, "STAGES", stages)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out)])
    status = command.main()
    summary = json.loads((out / "summary.json").read_text())
    return status, {name: [row["status"], row["what"]] for name, row in summary.items()}


def test_all_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, summary = run(monkeypatch, tmp_path)
    assert status == 0 and {row[0] for row in summary.values()} == {PASSED}
    assert list(summary) == ["build", "test", "ranks", "sanitize", "speed"]
    assert "passed" in capsys.readouterr().out


def test_nothing_is_built_on_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, summary = run(monkeypatch, tmp_path, build=Result(FAILED, "x.cu:1: error: y"))
    assert status == 1 and summary["build"] == [FAILED, "x.cu:1: error: y"]
    assert all(row == [NOT_RUN, "build did not pass"] for name, row in summary.items() if name != "build")


def test_what_could_not_run_did_not_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, summary = run(monkeypatch, tmp_path, test=Result(NOT_RUN, "all 172 tests were skipped"))
    assert status == 2
    assert summary["ranks"][0] == PASSED
    assert summary["sanitize"] == summary["speed"] == [NOT_RUN, "test did not pass"]


def test_a_stage_that_breaks_failed_and_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, summary = run(monkeypatch, tmp_path, ranks=OSError("no space"))
    assert status == 1 and summary["ranks"] == [FAILED, "OSError: no space"] and summary["speed"][0] == PASSED


CASES = {"passed": "<testcase name='a'/>", "skipped": "<testcase name='b'><skipped message='needs a GPU'/></testcase>"}
CASES["failed"] = "<testcase name='c'><failure message='1 != 2'/></testcase>"


@pytest.mark.parametrize(
    ("cases", "status", "expected"),
    [
        (["passed"] * 3, 0, Result(PASSED, "3 tests")),
        (["passed", "skipped"], 0, Result(PASSED, "1 tests; 1 skipped: needs a GPU")),
        (["skipped"] * 2, 0, Result(NOT_RUN, "all 2 tests were skipped: needs a GPU")),
        (["passed", "failed"], 1, Result(FAILED, "1 of 2 tests failed (status 1), first c: {log}")),
        (["passed"], 9, Result(FAILED, "0 of 1 tests failed (status 9), first ?: {log}")),  # compute-sanitizer's word
        (None, 4, Result(FAILED, "pytest ended with 4 before it had run anything: {log}")),
    ],
)
def test_tests(cases: list[str] | None, status: int, expected: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "test.log"

    def pytest_ran(_log: Path, *_arguments: str, prefix: tuple[str, ...] = ()) -> int:
        if cases is not None:
            text = "".join(CASES[case] for case in cases)
            log.with_suffix(".xml").write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
        return status

    monkeypatch.setattr(build, "_run", pytest_ran)
    assert build._pytest(log) == expected._replace(what=expected.what.format(log=log))


@pytest.mark.sources
def test_what_is_not_compiled_is_laid_out_whole(tmp_path: Path) -> None:
    build.lay_out(tmp_path)
    for path in ("__init__.py", "py.typed", "torch_impl/ops.py", "tf_impl/keras/layer.py"):
        assert (tmp_path / path).exists(), path
    patches = sorted(path.name for path in (tmp_path / "horovod_build" / "patches").iterdir())
    assert patches == [patch.name for patch in horovod_build.patches()]


def test_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that lacks something the stage names it, and nothing is a traceback."""
    monkeypatch.setattr(build.shutil, "which", lambda name: None if name == "nvcc" else f"/bin/{name}")
    result = build.build(tmp_path, None)
    assert result.status == NOT_RUN and "nvcc (the CUDA compiler" in result.what
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        assert build.speed(tmp_path, None) == Result(NOT_RUN, build._no_gpu())
        assert build.sanitize(tmp_path, None).status == NOT_RUN
