"""What building Horovod decides without compiling: patches, cache key, environment, error report."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from hvd_syncbn import horovod_build

VERSIONS = {"torch": "2.13.0+cpu", "tensorflow": "2.21.0"}

LOG = """\
  [ 40%] Building CXX object horovod/CMakeFiles/x.dir/common/half.cc.o
  cc1plus -Werror=return-type half.cc  # flags that only mention an error
  In file included from /src/horovod/torch/adapter_v2.h:22,
                   from /src/horovod/torch/adapter_v2.cc:20:
  /torch/c10/util/C++17.h:27:2: error: #error You need C++17 to compile PyTorch
     27 | #error You need C++17 to compile PyTorch
        |  ^~~~~
  compilation terminated.
  [ 41%] Building CXX object horovod/CMakeFiles/x.dir/common/common.cc.o
  [ 42%] Building CXX object horovod/CMakeFiles/x.dir/common/timeline.cc.o
  /torch/c10/util/Other.h:30:2: error: a later one
  make[2]: *** [CMakeFiles/x.dir/build.make:76: adapter_v2.cc.o] Error 1
  make[1]: *** [CMakeFiles/Makefile2:100: all] Error 2
  error: subprocess-exited-with-error
""".splitlines()


NEW = horovod_build.patching.parse(
    "0001-new.patch",
    """Subject: Say more
Why: Because it was
 too little.
Upstream: none known

--- a/sub/file.txt
+++ b/sub/file.txt
@@ -1,3 +1,4 @@
 one
+and a half
 two
 three
""",
)


@pytest.fixture(scope="module")
def horovod_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Horovod's source as released, from the archive that the build used."""
    root = horovod_build.cache_root()
    root.mkdir(parents=True, exist_ok=True)
    return horovod_build.unpack(horovod_build.fetch_sdist(root, os.environ), tmp_path_factory.mktemp("horovod"))


class TestPatches:
    def test_all_fit_the_release_in_their_order(self, horovod_source: Path, tmp_path: Path) -> None:
        """And only so: none of them twice, and where one builds on another, not without that."""
        source = shutil.copytree(horovod_source, tmp_path / "source")
        patches = horovod_build.patches()
        assert [patch.name[:4] for patch in patches] == [f"{number:04}" for number in range(1, len(patches) + 1)]
        horovod_build.apply(source, patches)
        for file in {file for patch in patches for file in re.findall(r"^\+\+\+ b/(\S+)$", patch.diff, re.MULTILINE)}:
            before, after = (root / file for root in (horovod_source, source))
            assert not before.exists() or before.read_bytes() != after.read_bytes(), file
        for patch in patches:
            with pytest.raises(horovod_build.BuildError, match=patch.name):
                horovod_build.apply(source, [patch])

    def test_one_is_applied(self, tmp_path: Path) -> None:
        path = tmp_path / "sub/file.txt"
        path.parent.mkdir()
        path.write_text("one\ntwo\nthree\n")
        horovod_build.apply(tmp_path, [NEW])
        assert path.read_text() == "one\nand a half\ntwo\nthree\n"
        assert [file.name for file in tmp_path.rglob("*")] == ["sub", "file.txt"]

    @pytest.mark.parametrize("text", ["one\ntwo\nfour\n", "one\nand a half\ntwo\nthree\n", "", None])
    def test_one_that_does_not_fit_is_refused_by_name(self, tmp_path: Path, text: str | None) -> None:
        path = tmp_path / "sub/file.txt"
        path.parent.mkdir()
        if text is not None:
            path.write_text(text)
        with pytest.raises(horovod_build.BuildError, match=r"0001-new\.patch"):
            horovod_build.apply(tmp_path, [NEW])
        assert (path.read_text() if path.exists() else None) == text

    def test_header(self) -> None:
        assert (NEW.subject, NEW.why, NEW.upstream) == ("Say more", "Because it was too little.", "none known")
        assert NEW.diff.startswith("--- a/sub/file.txt\n") and NEW.diff.endswith(" three\n")

    @pytest.mark.parametrize("field", ["Subject", "Why", "Upstream"])
    def test_a_header_without_a_field_is_refused(self, field: str) -> None:
        text = "Subject: a\nWhy: b\nUpstream: c\n\n--- a/x\n+++ b/x\n"
        horovod_build.patching.parse("0001-x.patch", text)
        with pytest.raises(ValueError, match=rf"0001-x\.patch.*Received: no {field}"):
            horovod_build.patching.parse("0001-x.patch", text.replace(f"{field}:", "Other:"))

    def test_listed_on_the_command_line_and_in_the_docs(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert horovod_build.main(["--list"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        rows = []
        for patch in horovod_build.patches():
            assert f"{patch.name}: {patch.subject} {patch.why} Upstream: {patch.upstream}" in said
            rows.append(f"| `{patch.name}` | {patch.subject} | {patch.why} | {patch.upstream} |")
        docs = (Path(__file__).parents[2] / "docs/horovod_patches.md").read_text()
        assert [line for line in docs.splitlines() if line.startswith("| `")] == rows


class TestSdist:
    def test_another_archive_is_refused(self, tmp_path: Path) -> None:
        archive = tmp_path / "horovod-0.28.1.tar.gz"
        archive.write_bytes(b"not Horovod")
        with pytest.raises(horovod_build.BuildError, match="SHA-256"):
            horovod_build.verify_sdist(archive)

    def test_a_cached_one_is_not_downloaded_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        archive = tmp_path / "horovod-0.28.1.tar.gz"
        archive.write_bytes(b"as released")
        monkeypatch.setattr(horovod_build, "SDIST_SHA256", horovod_build.sha256_of(archive))
        assert horovod_build.fetch_sdist(tmp_path, {"PATH": ""}) == archive

    def test_a_damaged_cached_one_is_downloaded_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        archive = tmp_path / "horovod-0.28.1.tar.gz"
        archive.write_bytes(b"as rel")
        fake_pip(monkeypatch, lambda folder: (folder / archive.name).write_bytes(b"as released"))
        monkeypatch.setattr(horovod_build, "SDIST_SHA256", horovod_build.hashlib.sha256(b"as released").hexdigest())
        assert horovod_build.fetch_sdist(tmp_path, {}).read_bytes() == b"as released"

    def test_a_wrong_download_is_refused_and_not_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_pip(monkeypatch, lambda folder: (folder / "horovod-0.28.1.tar.gz").write_bytes(b"tampered"))
        with pytest.raises(horovod_build.BuildError, match="SHA-256"):
            horovod_build.fetch_sdist(tmp_path, {})
        assert list(tmp_path.iterdir()) == []

    def test_a_failing_pip_is_quoted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_pip(monkeypatch, lambda _folder: None, status=1, said="ERROR: No matching distribution found")
        with pytest.raises(horovod_build.BuildError, match="No matching distribution"):
            horovod_build.fetch_sdist(tmp_path, {})

    def test_unpack_gives_the_source_root(self, tmp_path: Path) -> None:
        archive = tmp_path / "a.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            info = tarfile.TarInfo("horovod-0.28.1/setup.py")
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))
        root = horovod_build.unpack(archive, tmp_path / "out")
        assert (root / "setup.py").read_text() == "text"


def fake_pip(monkeypatch: pytest.MonkeyPatch, download: Callable[[Path], object], status: int = 0, said: str = "") -> None:
    def run(command: list[str], **_kwargs: object) -> subprocess.CompletedProcess[str]:
        download(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, status, stdout="", stderr=said)

    monkeypatch.setattr(horovod_build.subprocess, "run", run)


class TestCacheKey:
    def key(self, **changed: object) -> str:
        arguments: dict = {"versions": VERSIONS, "settings": {"HOROVOD_WITH_GLOO": "1"}, "compiler": "g++ 12.2.0"}
        return horovod_build.cache_key(**(arguments | changed))

    def test_is_stable_and_readable(self) -> None:
        assert self.key() == self.key()
        for part in ("0.28.1", "torch2.13.0+cpu", "tensorflow2.21.0", sys.implementation.cache_tag):
            assert part in self.key()
        assert "/" not in self.key()

    @pytest.mark.parametrize(
        "changed",
        [
            {"versions": {**VERSIONS, "torch": "2.13.0+cu130"}},
            {"versions": {**VERSIONS, "tensorflow": "2.20.0"}},
            {"versions": {"torch": VERSIONS["torch"]}},
            {"settings": {"HOROVOD_WITH_GLOO": "1", "HOROVOD_WITH_MPI": "1"}},
            {"compiler": "g++ 13.1.0"},
        ],
        ids=str,
    )
    def test_changes_with_what_is_built_against(self, changed: dict) -> None:
        assert self.key(**changed) != self.key()

    @pytest.mark.parametrize(
        ("target", "value"),
        [
            ("hvd_syncbn.horovod_build.HOROVOD_VERSION", "0.28.2"),
            ("hvd_syncbn.horovod_build.patches", lambda: horovod_build.patching.patches()[:2]),
            ("hvd_syncbn.horovod_build.patches", lambda: (*horovod_build.patching.patches(), NEW)),
            ("hvd_syncbn.horovod_build.SDIST_SHA256", "0" * 64),
            ("sys.implementation.cache_tag", "cpython-399"),
            ("sysconfig.get_platform", lambda: "linux-aarch64"),
            ("platform.libc_ver", lambda: ("glibc", "2.99")),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_changes_with_source_and_platform(self, target: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
        before = self.key()
        monkeypatch.setattr(target, value)
        assert self.key() != before

    def test_cache_root_follows_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        monkeypatch.delenv("HVD_SYNCBN_CACHE", raising=False)
        assert horovod_build.cache_root() == Path("/xdg/hvd-syncbn/horovod")
        monkeypatch.setenv("HVD_SYNCBN_CACHE", "/own")
        assert horovod_build.cache_root() == Path("/own/horovod")


class TestSettings:
    def test_builds_for_what_is_installed_over_gloo(self) -> None:
        assert horovod_build.build_settings({"torch": "2"}, {}) == {
            "HOROVOD_WITH_PYTORCH": "1",
            "HOROVOD_WITHOUT_TENSORFLOW": "1",
            "HOROVOD_WITHOUT_MXNET": "1",
            "HOROVOD_WITHOUT_MPI": "1",
            "HOROVOD_WITH_GLOO": "1",
        }

    def test_options(self) -> None:
        settings = horovod_build.build_settings(VERSIONS, {}, with_mpi=True, with_nccl=True)
        assert settings["HOROVOD_WITH_MPI"] == "1"
        assert "HOROVOD_WITHOUT_MPI" not in settings
        assert settings["HOROVOD_GPU_OPERATIONS"] == "NCCL"

    def test_the_callers_variables_win_over_ours_and_runtime_ones_stay_out(self) -> None:
        environ = {
            "HOROVOD_WITH_MPI": "1",
            "HOROVOD_WITHOUT_TENSORFLOW": "1",
            "HOROVOD_NCCL_HOME": "/nccl",
            "HOROVOD_CYCLE_TIME": "0.1",
            "HOME": "/root",
        }
        settings = horovod_build.build_settings(VERSIONS, environ)
        assert settings["HOROVOD_WITH_MPI"] == "1"
        assert settings["HOROVOD_WITHOUT_TENSORFLOW"] == "1"
        assert "HOROVOD_WITH_TENSORFLOW" not in settings
        assert settings["HOROVOD_NCCL_HOME"] == "/nccl"
        assert not {"HOROVOD_CYCLE_TIME", "HOME"} & set(settings)

    def test_environment_of_the_build(self) -> None:
        settings = {"HOROVOD_WITH_GLOO": "1"}
        environ = {"PATH": "/bin", "HOROVOD_WITHOUT_GLOO": "1", "MAKEFLAGS": "w -j8 --jobserver-auth=3,4"}
        env = horovod_build.build_environment(settings, environ)
        assert env["PATH"] == "/bin"
        assert env["HOROVOD_WITH_GLOO"] == "1"
        assert "HOROVOD_WITHOUT_GLOO" not in env
        assert env["CMAKE_POLICY_VERSION_MINIMUM"] == "3.5"
        assert env["MAKEFLAGS"] == f"-j{horovod_build.build_jobs()}"
        assert 1 <= horovod_build.build_jobs() <= (os.cpu_count() or 1)


class TestTools:
    def test_no_compiler(self, tmp_path: Path) -> None:
        with pytest.raises(horovod_build.BuildError, match=r"apt-get install g\+\+"):
            horovod_build.find_compiler({"PATH": str(tmp_path)})

    def test_the_callers_compiler_is_asked(self, tmp_path: Path) -> None:
        compiler = tmp_path / "mycxx"
        compiler.write_text("#!/bin/sh\necho mycxx 99.1\necho more\n")
        compiler.chmod(0o755)
        assert horovod_build.find_compiler({"PATH": str(tmp_path), "CXX": "mycxx -m64"}) == "mycxx 99.1"

    @pytest.mark.parametrize("missing", ["make", "patch"])
    def test_a_missing_tool(self, missing: str, tmp_path: Path) -> None:
        for tool in {"make", "patch", "cmake"} - {missing}:
            (tmp_path / tool).touch(0o755)
        with pytest.raises(horovod_build.BuildError, match=f"apt-get install {missing}"):
            horovod_build.check_tools({"PATH": str(tmp_path)})

    def test_no_framework(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(horovod_build, "framework_versions", dict)
        assert horovod_build.main([]) == 1
        assert "Neither PyTorch nor TensorFlow is installed" in capsys.readouterr().err


class TestErrorReport:
    def test_the_compilers_first_error_with_its_context(self) -> None:
        said = horovod_build.first_error(LOG)
        assert "C++17.h:27:2: error:" in said[2]
        assert said[0].lstrip().startswith("In file included")
        assert len(said) == 8
        assert not any("subprocess" in line for line in said)

    def test_cmake_error(self) -> None:
        said = horovod_build.first_error(["a", "CMake Error at CMakeLists.txt:1:", "  no MPI", "error: pip's own"])
        assert said[1].startswith("CMake Error")

    def test_linker_error(self) -> None:
        said = horovod_build.first_error(["ok", "x.o: undefined reference to `f'", "make: *** Error 1"])
        assert "undefined reference" in said[1]

    def test_without_an_error_the_end(self) -> None:
        assert horovod_build.first_error([str(i) for i in range(50)]) == [str(i) for i in range(40, 50)]

    def test_long_lines_are_cut(self) -> None:
        assert len(horovod_build.first_error(["a.cc:1:1: error: " + "x" * 5000])[0]) == 200

    def test_a_failed_build_reports_it_and_caches_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        log = "\n".join(LOG)
        monkeypatch.setenv("HVD_SYNCBN_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(horovod_build, "fetch_sdist", lambda _root, _env: tmp_path)
        monkeypatch.setattr(horovod_build, "unpack", lambda _archive, _folder: tmp_path)
        monkeypatch.setattr(horovod_build, "apply", lambda _source, _patches: None)
        real = horovod_build.run_logged

        def failing(_command: list[str], **kwargs: object) -> int:
            return real([sys.executable, "-c", f"print({log!r}); raise SystemExit(1)"], **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(horovod_build, "run_logged", failing)
        assert horovod_build.main(["--no-install"]) == 1
        error = capsys.readouterr().err
        assert "error: #error You need C++17" in error
        assert "a later one" not in error
        path = Path(error.split("The full log: ")[1].strip())
        assert path.read_text() == log + "\n"
        assert not list((tmp_path / "cache").rglob("*.whl"))


class TestRunning:
    def test_steps_are_read_from_makes_output(self) -> None:
        line = "  [ 12%] Building CXX object horovod/torch/CMakeFiles/pytorch.dir/__/common/common.cc.o"
        assert horovod_build.parse_step(line) == (12, "common.cc")
        assert horovod_build.parse_step("  [100%] Built target pytorch") == (100, "pytorch")
        assert horovod_build.parse_step("c++ -o x [50%]") is None

    def test_plain_progress(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(horovod_build, "_PLAIN_PROGRESS_S", 0.01)
        with horovod_build.show_progress(Console(file=io.StringIO()), "Horovod") as report:
            report(12, "common.cc")
            time.sleep(0.2)
        assert "12 %, common.cc" in capsys.readouterr().out

    def test_an_interrupt_ends_the_whole_group(self, tmp_path: Path) -> None:
        def interrupted(_percent: int, _step: str) -> None:
            raise KeyboardInterrupt

        pid_file = tmp_path / "pid"
        script = f"sleep 600 & echo $! > {pid_file}; echo '[  1%] Building x.o'; wait"
        with (tmp_path / "log").open("w") as log, pytest.raises(KeyboardInterrupt):
            horovod_build.run_logged(["/bin/sh", "-c", script], cwd=tmp_path, env=dict(os.environ), log=log, report=interrupted)
        deadline = time.monotonic() + 5
        while _running(int(pid_file.read_text())):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_a_cached_wheel_is_taken_without_building(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("HVD_SYNCBN_CACHE", str(tmp_path))
        monkeypatch.setattr(horovod_build, "cache_key", lambda *_args: "key")
        monkeypatch.setattr(horovod_build, "_compile", lambda *_args: pytest.fail("built"))
        wheel = tmp_path / "horovod/key/horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
        wheel.parent.mkdir(parents=True)
        wheel.touch()
        assert horovod_build.build(install=False) == wheel
        assert str(wheel) in capsys.readouterr().out

    def test_a_second_build_waits_for_the_first(self, tmp_path: Path) -> None:
        lock = tmp_path / "lock"
        code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True)"
        code += "; sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
            assert first.stdout is not None and first.stdout.readline() == b"held\n"
            said = io.StringIO()
            console = Console(file=said)
            # The first holder goes when we have said that we wait.
            monkey_print = console.print
            console.print = lambda *args: (monkey_print(*args), first.send_signal(signal.SIGKILL))  # type: ignore[method-assign]
            with horovod_build._locked(lock, console):
                assert "waiting" in said.getvalue()


def _running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class TestCheck:
    @pytest.fixture
    def built_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
        """Put a fake Horovod, built for the given versions, in front of the path."""
        package = tmp_path / "horovod"
        package.mkdir()
        (package / "__init__.py").touch()
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "horovod", raising=False)
        monkeypatch.setattr(horovod_build, "framework_versions", lambda: VERSIONS)
        return lambda versions: (package / "metadata.json").write_text(json.dumps(versions)) and None

    def test_fitting(self, built_for: Callable[[dict[str, str]], None]) -> None:
        built_for({"pytorch": "2.13.0+cpu", "tensorflow": "2.21.0", "dummy": "none"})
        assert horovod_build.check() == []

    def test_other_version_and_missing_framework(self, built_for: Callable[[dict[str, str]], None]) -> None:
        built_for({"pytorch": "2.12.0+cpu"})
        assert horovod_build.check() == [
            "Horovod was built for torch 2.12.0+cpu, and torch 2.13.0+cpu is installed.",
            "Horovod was built without tensorflow, and tensorflow 2.21.0 is installed.",
        ]

    def test_without_native_libraries(self, built_for: Callable[[dict[str, str]], None]) -> None:
        assert horovod_build.check() == ["The installed Horovod was built without native libraries."]
