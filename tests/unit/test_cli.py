"""The command line: what it accepts, and what doctor finds and advises."""

import subprocess
from pathlib import Path

import pytest

from hvd_syncbn import __version__, cli, horovod_build, native, verify

VERSIONS = {"torch": "2.13.0", "tensorflow": "2.21.0"}
HEALTHY = {"gloo": True, "mpi": False, "nccl": False, "isa": "avx2"}


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation where every probe succeeds."""
    monkeypatch.setattr(horovod_build, "framework_versions", lambda: VERSIONS)
    monkeypatch.setattr(horovod_build, "check", list)
    monkeypatch.setattr(cli, "_probe", lambda _body: HEALTHY)
    monkeypatch.delenv("HOROVOD_CYCLE_TIME", raising=False)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    status = cli.main(argv)
    return status, " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("healthy")
class TestDoctor:
    def test_healthy(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out = run(capsys, "doctor")
        assert status == 0
        for text in (__version__, "2.13.0", "2.21.0", "built with gloo", "instruction set avx2", "1 ms, the default"):
            assert text in out
        assert "To repair" not in out

    def test_cycle_time_in_force(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOROVOD_CYCLE_TIME", "0.1")
        assert "HOROVOD_CYCLE_TIME 0.1 ms" in run(capsys, "doctor")[1]

    def test_advice(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOROVOD_CACHE_CAPACITY", "0")
        status, out = run(capsys, "doctor")
        assert status == 0
        assert "HOROVOD_CACHE_CAPACITY 0: the ranks agree anew" in out

    def test_horovod_for_another_version(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(horovod_build, "check", lambda: ["Horovod was built for torch 2.12.0."])
        status, out = run(capsys, "doctor")
        assert status == 1
        assert "Horovod was built for torch 2.12.0." in out
        assert "-m hvd_syncbn.horovod_build" in out

    def test_parts_that_do_not_load(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cli, "_probe", lambda _body: {"error": "ImportError: undefined symbol [x]"})
        status, out = run(capsys, "doctor")
        assert status == 1
        assert "ImportError: undefined symbol" in out
        assert out.count("-m pip install") == 1

    def test_no_framework(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(horovod_build, "framework_versions", dict)
        status, out = run(capsys, "doctor")
        assert status == 1
        assert "neither PyTorch nor TensorFlow is installed" in out


class TestProbe:
    def test_returns_what_the_statements_found(self) -> None:
        assert cli._probe("print('noise'); found['x'] = 1") == {"x": 1}

    def test_first_line_of_an_error(self) -> None:
        assert cli._probe("raise ImportError('first\\nsecond')") == {"error": "ImportError: first"}

    def test_a_crash_is_told(self) -> None:
        assert cli._probe("os.kill(os.getpid(), 11)") == {"error": "crashed with SIGSEGV"}

    def test_an_exit_is_told(self) -> None:
        assert "error" in cli._probe("os._exit(3)")


def test_the_real_installation_is_examined(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, "doctor")
    assert status == 0, out


def test_build_horovod_reaches_the_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, bool] = {}
    monkeypatch.setattr(horovod_build, "build", lambda **options: called.update(options))
    assert cli.main(["build-horovod", "--with-nccl", "--no-install"]) == 0
    assert called == {"with_mpi": False, "with_nccl": True, "install": False}


@pytest.mark.parametrize("argv", [[], ["unknown"], ["doctor", "extra"]])
def test_wrong_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2


def test_verify_finds_one_sha256(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify"]) == 0
    output = capfd.readouterr().out
    assert "EQUAL: one sha256" in output
    assert output.count("PyTorch") == output.count("TensorFlow") == len(native.isas()) * len(verify.LAYOUTS)


def test_verify_tells_what_differs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    lines = iter(['{"here": "aa"}', '{"there": "ab"}'])

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, next(lines), "")

    monkeypatch.setattr(verify.subprocess, "run", run)
    assert verify.verify() == 1
    assert "NOT EQUAL" in capfd.readouterr().out


class TestBench:
    def test_runs_the_benchmarks_of_the_checkout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        called: list[object] = []

        def run(command: list[str], *, cwd: Path, check: bool) -> subprocess.CompletedProcess[str]:
            called.extend([command[1:], (cwd / "benchmarks" / "__main__.py").exists()])
            return subprocess.CompletedProcess(command, 3)

        monkeypatch.setattr(cli.subprocess, "run", run)
        assert cli.main(["bench", "--quick"]) == 3
        assert called == [["-m", "benchmarks", "--quick"], True]

    def test_a_wheel_has_none(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        monkeypatch.setattr(cli, "__file__", str(tmp_path / "hvd_syncbn" / "cli.py"))
        assert cli.main(["bench"]) == 1
        assert "run `make bench`" in capsys.readouterr().err
