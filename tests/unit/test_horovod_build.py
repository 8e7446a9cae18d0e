"""What building Horovod decides without compiling: patches, cache key, environment, error report."""

import contextlib
import importlib.util
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
    def test_none_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Otherwise Horovod would silently be built as released."""
        monkeypatch.setattr(horovod_build.patching, "FOLDER", tmp_path)
        with pytest.raises(horovod_build.BuildError, match=f"Reinstall hvd-syncbn. Searched: {tmp_path}"):
            horovod_build.patches()

    def test_all_fit_the_release_in_their_order(self, horovod_source: Path, tmp_path: Path) -> None:
        """And only so: none of them twice, and where one builds on another, not without that."""
        source = shutil.copytree(horovod_source, tmp_path / "source")
        patches = horovod_build.patches()
        numbers = [patch.name[:4] for patch in patches]
        assert numbers == sorted(set(numbers)) and all(number.isdigit() for number in numbers)
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
        arguments: dict = {"versions": VERSIONS, "settings": {"HOROVOD_WITH_GLOO": "1"}, "system": {"compiler": "g++ 12.2.0"}}
        arguments |= changed
        plan = horovod_build.Plan(arguments["settings"], arguments["system"], notes=[])
        return horovod_build.cache_key(arguments["versions"], plan)

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
            {"system": {"compiler": "g++ 13.1.0"}},
            {"system": {"compiler": "g++ 12.2.0", "CUDA": "13.0.88"}},
            {"system": {"compiler": "g++ 12.2.0", "NCCL": "2.30.7"}},
            {"system": {"compiler": "g++ 12.2.0", "MPI": "4.1.4"}},
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

    def test_does_not_change_with_where_things_lie(self) -> None:
        settings = {"HOROVOD_WITH_GLOO": "1", "HOROVOD_NCCL_HOME": "/env/nccl", "HOROVOD_CUDA_HOME": "/usr/local/cuda"}
        assert self.key(settings=settings) == self.key()

    def test_cache_root_follows_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        monkeypatch.delenv("HVD_SYNCBN_CACHE", raising=False)
        assert horovod_build.cache_root() == Path("/xdg/hvd-syncbn/horovod")
        monkeypatch.setenv("HVD_SYNCBN_CACHE", "/own")
        assert horovod_build.cache_root() == Path("/own/horovod")


def tool(path: Path, script: str = "") -> Path:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


class System:
    """A machine with a compiler, and with what a test puts there: the environment that knows it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.monkeypatch = monkeypatch
        self.environ = {"PATH": f"{root / 'bin'}:/usr/bin:/bin"}
        tool(root / "bin/c++", "echo c++ 12.2.0")
        # Nothing of the real machine's.
        real = shutil.which
        monkeypatch.setattr(shutil, "which", lambda name, path=None: real(name, path=str(root / "bin")))
        monkeypatch.setattr(horovod_build.system, "_USUAL_CUDA", root / "nowhere")
        monkeypatch.setattr(horovod_build.system, "_USUAL_NCCL", ())
        monkeypatch.setattr(horovod_build.system, "_of_pip", lambda: [root / "site/nvidia/nccl"])
        self.cuda_frameworks()

    def cuda_frameworks(self, *names: str) -> None:
        self.monkeypatch.setattr(horovod_build, "cuda_frameworks", lambda: list(names))

    def mpi(self) -> None:
        tool(self.root / "bin/mpicxx", 'test "$1" = --showme:version && echo "mpicxx: Open MPI 4.1.4 (Language: C++)"')

    def cuda(self) -> Path:
        """A toolkit whose nvcc in the path is a script elsewhere."""
        home = self.root / "cuda-13.0"
        says = f"if [ $1 = --version ]; then echo 'release 13.0, V13.0.88'; else echo '#$ TOP={home}/bin/..' >&2; fi"
        tool(home / "bin/nvcc", says)
        tool(self.root / "bin/nvcc", f'exec {home}/bin/nvcc "$@"')
        return home

    def nccl(self, home: str = "site/nvidia/nccl") -> Path:
        header = self.root / home / "include/nccl.h"
        header.parent.mkdir(parents=True)
        header.write_text("#define NCCL_MAJOR 2\n#define NCCL_MINOR 30\n#define NCCL_PATCH 7\n")
        return self.root / home


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    return System(tmp_path, monkeypatch)


class TestPlan:
    def test_builds_for_what_is_installed_over_gloo(self, system: System) -> None:
        plan = horovod_build.make_plan({"torch": "2"}, system.environ)
        assert plan.settings == {
            "HOROVOD_WITH_PYTORCH": "1",
            "HOROVOD_WITHOUT_TENSORFLOW": "1",
            "HOROVOD_WITHOUT_MXNET": "1",
            "HOROVOD_WITHOUT_MPI": "1",
            "HOROVOD_WITH_GLOO": "1",
        }
        assert (plan.system, plan.notes) == ({"compiler": "c++ 12.2.0"}, [])

    def test_the_callers_variables_win_over_ours_and_runtime_ones_stay_out(self, system: System) -> None:
        environ = system.environ | {
            "HOROVOD_WITH_MPI": "1",
            "HOROVOD_WITHOUT_TENSORFLOW": "1",
            "HOROVOD_CYCLE_TIME": "0.1",
            "HOME": "/root",
        }
        settings = horovod_build.make_plan(VERSIONS, environ).settings
        assert settings["HOROVOD_WITH_MPI"] == "1"
        assert settings["HOROVOD_WITHOUT_TENSORFLOW"] == "1"
        assert "HOROVOD_WITH_TENSORFLOW" not in settings
        assert not {"HOROVOD_CYCLE_TIME", "HOME"} & set(settings)

    def test_mpi_is_taken_along_where_it_is_asked_for(self, system: System) -> None:
        with pytest.raises(horovod_build.BuildError, match="apt-get install openmpi-bin libopenmpi-dev"):
            horovod_build.make_plan(VERSIONS, system.environ, mpi=True)
        system.mpi()
        for plan in (
            horovod_build.make_plan(VERSIONS, system.environ, mpi=True),
            horovod_build.make_plan(VERSIONS, system.environ | {"HOROVOD_WITH_MPI": "1"}),
            horovod_build.make_plan(VERSIONS, system.environ | {"HOROVOD_WITHOUT_MPI": "1"}, mpi=True),  # options come last
        ):
            assert plan.settings["HOROVOD_WITH_MPI"] == "1"
            assert plan.system["MPI"] == "Open MPI 4.1.4 (Language: C++)"
            assert any("with MPI" in note for note in plan.notes)
        plan = horovod_build.make_plan(VERSIONS, system.environ)
        assert plan.settings["HOROVOD_WITHOUT_MPI"] == "1" and "MPI" not in plan.system and not plan.notes

    def test_builds_for_the_cpu_do_not_depend_on_cuda(self, system: System) -> None:
        before = horovod_build.make_plan(VERSIONS, system.environ)
        system.cuda()
        system.nccl()
        assert horovod_build.make_plan(VERSIONS, system.environ) == before

    def test_nccl_where_all_frameworks_are_for_cuda(self, system: System) -> None:
        cuda, nccl = system.cuda(), system.nccl()
        system.cuda_frameworks("torch")
        plan = horovod_build.make_plan({"torch": "2.14.1+cu130"}, system.environ)
        assert plan.settings["HOROVOD_GPU_OPERATIONS"] == "NCCL"
        assert plan.settings["HOROVOD_NCCL_HOME"] == str(nccl)
        assert plan.settings["HOROVOD_CUDA_HOME"] == str(cuda)
        assert (plan.system["CUDA"], plan.system["NCCL"]) == ("13.0.88", "2.30.7")
        assert any("with NCCL 2.30.7" in note for note in plan.notes)
        env = horovod_build.build_environment(plan.settings, system.environ)
        assert env["CUDA_HOME"] == env["CUDAToolkit_ROOT"] == str(cuda) and env["CUDACXX"] == f"{cuda}/bin/nvcc"

    def test_what_keeps_nccl_out_is_said(self, system: System) -> None:
        torch = {"torch": "2.14.1+cu130"}
        system.cuda_frameworks("torch")

        def check(versions: dict[str, str], said: str) -> None:
            plan = horovod_build.make_plan(versions, system.environ)
            assert "HOROVOD_GPU_OPERATIONS" not in plan.settings
            (note,) = plan.notes
            assert "host memory" in note and said in note
            with pytest.raises(horovod_build.BuildError, match=said):
                horovod_build.make_plan(versions, system.environ, nccl=True)

        check(torch, "set CUDA_HOME")
        system.cuda()
        check(torch, "pip install nvidia-nccl-cu13")
        system.nccl()
        check(torch | {"tensorflow": "2.21.0"}, "tensorflow 2.21.0 is not a CUDA build")
        plan = horovod_build.make_plan(torch, system.environ, nccl=False)
        assert "HOROVOD_GPU_OPERATIONS" not in plan.settings and "NCCL" not in plan.system
        # Horovod gets the path of CUDA without NCCL, too, and the build depends on it, because it reads GPU tensors.
        assert plan.system["CUDA"] == "13.0.88" and "as requested" in plan.notes[0]

    def test_the_callers_gpu_variables(self, system: System) -> None:
        system.cuda()
        system.cuda_frameworks("torch")
        nccl = system.nccl("own/nccl")
        environ = system.environ | {"HOROVOD_GPU_ALLREDUCE": "NCCL", "HOROVOD_NCCL_HOME": str(nccl)}
        plan = horovod_build.make_plan({"torch": "2.14.1+cu130"}, environ)
        assert plan.settings["HOROVOD_GPU_ALLREDUCE"] == "NCCL" and "HOROVOD_GPU_OPERATIONS" not in plan.settings
        assert plan.settings["HOROVOD_NCCL_HOME"] == str(nccl)
        for name in ("HOROVOD_NCCL_HOME", "HOROVOD_NCCL_INCLUDE", "CUDA_HOME", "HOROVOD_CUDA_HOME"):
            with pytest.raises(horovod_build.BuildError, match=f"{name}=.*nothing"):
                horovod_build.make_plan({"torch": "2.14.1+cu130"}, environ | {name: str(system.root / "nothing")})

    def test_the_callers_gpu_collectives_over_mpi(self, system: System) -> None:
        """Horovod's other way, for which NCCL need not be there."""
        cuda = system.cuda()
        system.cuda_frameworks("torch")
        environ = system.environ | {"HOROVOD_GPU_OPERATIONS": "MPI"}
        plan = horovod_build.make_plan({"torch": "2.14.1+cu130"}, environ)
        assert plan.settings["HOROVOD_GPU_OPERATIONS"] == "MPI" and plan.settings["HOROVOD_CUDA_HOME"] == str(cuda)
        assert "NCCL" not in plan.system and not plan.notes

    def test_frameworks_of_this_environment(self) -> None:
        """As their own words have it."""
        found = set()
        if importlib.util.find_spec("torch"):
            import torch

            found |= {"torch"} if torch.version.cuda else set()
        if importlib.util.find_spec("tensorflow"):
            import tensorflow

            found |= {"tensorflow"} if tensorflow.sysconfig.get_build_info()["is_cuda_build"] else set()
        assert set(horovod_build.cuda_frameworks()) == found

    @pytest.mark.parametrize(("text", "cuda"), [("cuda: Optional[str] = '13.0'", True), ("cuda: Optional[str] = None", False)])
    def test_pytorch_for_cuda(self, text: str, cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/__init__.py").touch()
        (tmp_path / "torch/version.py").write_text(f"__version__ = '9.9'\n{text}\ngit_version = 'a'\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        assert ("torch" in horovod_build.cuda_frameworks()) == cuda
        assert horovod_build.framework_versions()["torch"] == "9.9"


class TestEnvironment:
    def test_environment_of_the_build(self) -> None:
        settings = {"HOROVOD_WITH_GLOO": "1"}
        environ = {"PATH": "/bin", "HOROVOD_WITHOUT_GLOO": "1", "MAKEFLAGS": "w -j8 --jobserver-auth=3,4"}
        environ["PYTHONSAFEPATH"] = "1"
        env = horovod_build.build_environment(settings, environ)
        assert env["PATH"] == "/bin"
        assert env["HOROVOD_WITH_GLOO"] == "1"
        assert "HOROVOD_WITHOUT_GLOO" not in env
        assert env["CMAKE_POLICY_VERSION_MINIMUM"] == "3.5"
        assert "MAKEFLAGS" not in env  # a job server that this build cannot reach
        assert env["CMAKE_GENERATOR"] == "Ninja"
        assert env["CMAKE_BUILD_PARALLEL_LEVEL"] == str(horovod_build.build_jobs())
        assert "PYTHONSAFEPATH" not in env  # Horovod's setup.py imports what is beside it
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

    @pytest.mark.parametrize("missing", ["rich", "wheel"])
    def test_a_missing_package(self, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """rich, too, though the builder itself prints with it."""
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
        assert horovod_build.main([]) == 1
        assert f"pip install {missing}" in capsys.readouterr().err

    def test_importing_the_builder_needs_the_standard_library_alone(self) -> None:
        code = "import sys; sys.modules['rich'] = None; import hvd_syncbn.horovod_build"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    @pytest.mark.parametrize(("missing", "remedy"), [("ninja", "pip install ninja"), ("patch", "apt-get install patch")])
    def test_a_missing_tool(self, missing: str, remedy: str, tmp_path: Path) -> None:
        for tool in {"ninja", "patch", "cmake"} - {missing}:
            (tmp_path / tool).touch(0o755)
        with pytest.raises(horovod_build.BuildError, match=remedy):
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
    def test_steps_are_read_from_ninjas_output(self) -> None:
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
                assert "Waiting" in said.getvalue()


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
