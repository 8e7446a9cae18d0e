"""The stages of `python -m benchmarks.gpu`, over a package of this checkout that CMake alone builds into a folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

from hvd_syncbn import horovod_build

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"  # what to put on PYTHONPATH
CARRIED = "horovod"  # in the folder that `prepare` makes: what HVD_SYNCBN_CACHE has

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"

_TOOLS = {
    "cmake": "CMake 3.18 or newer",
    "ninja": "ninja",
    "g++": "a C++17 compiler",
    "nvcc": "the CUDA compiler (its folder on PATH, often /usr/local/cuda/bin)",
}
_MODULES = ("torch", "numpy", "ml_dtypes", "pytest", "pytest_timeout", "setuptools", "rich")


class Result(NamedTuple):
    """What became of a stage, and what there is to say."""

    status: str
    what: str


def _missing() -> str:
    """What this machine lacks, for a person; empty if nothing."""
    lacks = [f"{name} ({what})" for name, what in _TOOLS.items() if shutil.which(name) is None]
    lacks += [f"Python module {name}" for name in _MODULES if importlib.util.find_spec(name) is None]
    return f"this machine lacks {', '.join(lacks)}" if lacks else ""


def _no_gpu() -> str:
    """Why PyTorch can use no GPU here; empty if it can."""
    import torch

    return "" if torch.cuda.is_available() else f"needs an NVIDIA GPU, and PyTorch {torch.__version__} sees none"


def build(out: Path, _carried: Path | None) -> Result:
    """Configures, compiles and lays out a package of this checkout in `SITE`."""
    if lacks := _missing():
        return Result(NOT_RUN, lacks)
    import torch

    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(BUILD / "cmake"), "-G", "Ninja"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_INSTALL_PREFIX={SITE}",
        "-DHVD_SYNCBN_CUDA=on",
    ]
    whose = "all architectures"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real")
        whose = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    shutil.rmtree(SITE, ignore_errors=True)
    log = out / "build.log"
    with log.open("w") as file:
        for command in (configure, ["cmake", "--build", configure[4]], ["cmake", "--install", configure[4]]):
            if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
                said = "\n".join(horovod_build.first_error(log.read_text().splitlines()))
                return Result(FAILED, f"the first error of {log}:\n{said}")
    lay_out(SITE / "hvd_syncbn")
    return Result(PASSED, f"for {whose}; PyTorch {torch.__version__}")


def lay_out(package: Path) -> None:
    """Copies what is not compiled: Python, and Horovod's patches."""
    not_these = shutil.ignore_patterns("csrc", "CMakeLists.txt", "__pycache__")
    shutil.copytree(ROOT / "hvd_syncbn", package, ignore=not_these, dirs_exist_ok=True)


def _run(log: Path, *arguments: str, prefix: tuple[str, ...] = (), **environment: str) -> int:
    """Runs Python over the built package, its output on the screen and in `log`."""
    command = [*prefix, sys.executable, *arguments]
    with (
        log.open("w") as out,
        subprocess.Popen(
            command,
            cwd=ROOT,
            # Safe path: the package is the one in SITE, not the checkout's.
            env=os.environ | {"PYTHONPATH": str(SITE), "PYTHONSAFEPATH": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            out.write(line)
    return process.returncode


def _pytest(log: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> Result:
    """Runs the GPU tests; skipped ones did not pass."""
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    code = "import sys, hvd_syncbn, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ("-p", "no:cacheprovider", "-q", f"--junitxml={report}", "tests/gpu", *arguments)
    status = _run(log, "-c", code, *options, prefix=prefix)
    if not report.exists():
        return Result(FAILED, f"pytest ended with {status} before it had run anything: {log}")
    cases = list(ET.parse(report).getroot().iter("testcase"))
    bad = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skips = [skip.get("message", "") for case in cases for skip in case.iter("skipped")]
    reasons = "; ".join(sorted(set(skips)))
    if status or bad:
        return Result(FAILED, f"{len(bad)} of {len(cases)} tests failed (status {status}), first {(bad or ['?'])[0]}: {log}")
    if len(skips) == len(cases):
        return Result(NOT_RUN, f"all {len(cases)} tests were skipped: {reasons}")
    return Result(PASSED, f"{len(cases) - len(skips)} tests" + (f"; {len(skips)} skipped: {reasons}" if skips else ""))


def test(out: Path, _carried: Path | None) -> Result:
    """The bytes of every kernel and of the layer."""
    return _pytest(out / "test.log")


def ranks(out: Path, carried: Path | None) -> Result:
    """`verify` alone and with 2 ranks; over a Horovod without NCCL, which refuses ranks that share a GPU."""
    if importlib.util.find_spec("horovod") is None:
        if carried is None:
            return Result(NOT_RUN, "Horovod is not installed, and its source was not carried: --prepare, then --carried")
        log = out / "horovod.log"
        options = ("--without-nccl", "--no-install")
        if _run(log, "-m", "hvd_syncbn.horovod_build", *options, HVD_SYNCBN_CACHE=str(carried)):
            return Result(FAILED, f"Horovod did not build: {log}")
        wheel = max((carried / CARRIED).rglob("*.whl"), key=lambda path: path.stat().st_mtime)
        into = ("--no-deps", "--no-index", "--upgrade", "--target", str(SITE))
        if _run(log, "-m", "pip", "install", "-q", *into, str(wheel)):
            return Result(FAILED, f"Horovod could not be installed: {log}")
    path = os.pathsep.join([str(SITE / "bin"), os.environ.get("PATH", "")])
    on_gpu = True
    for name, arguments in (("alone", ["verify"]), ("2 ranks", ["verify", "-np", "2"])):
        log = out / f"verify_{name.replace(' ', '_')}.log"
        if _run(log, "-m", "hvd_syncbn.cli", *arguments, PATH=path):
            return Result(FAILED, f"verify, {name}: {log}")
        on_gpu &= "GPU" in log.read_text()
    if not on_gpu:
        return Result(NOT_RUN, f"verify is equal, alone and with 2 ranks, but ran without the GPU: {_no_gpu() or log}")
    return Result(PASSED, "verify is equal, alone and with 2 ranks on one GPU")


def sanitize(out: Path, _carried: Path | None) -> Result:
    """compute-sanitizer over a test that launches every kernel."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None or _no_gpu():
        return Result(NOT_RUN, _no_gpu() or "there is no compute-sanitizer on PATH")
    for tool in ("memcheck", "racecheck"):
        prefix = (sanitizer, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no")
        result = _pytest(out / f"{tool}.log", "-k", "small_steps", prefix=prefix)
        if result.status != PASSED:
            return Result(result.status, f"{tool}: {result.what}")
    return Result(PASSED, "memcheck and racecheck are clean")


def speed(out: Path, _carried: Path | None) -> Result:
    """The layer beside its peers."""
    if reason := _no_gpu():
        return Result(NOT_RUN, reason)
    code = "import sys; sys.path.append('.'); from benchmarks.gpu import speed; speed.main(sys.argv[1])"
    log = out / "speed.log"
    status = _run(log, "-c", code, str(out))
    return Result(FAILED, f"ended with {status}: {log}") if status else Result(PASSED, f"{out / 'speed.txt'}")


def prepare(folder: Path) -> None:
    """Fetches what a machine with PyTorch, nvcc and no network lacks: Horovod's source. What else is missing, `build` names."""
    cache = folder / CARRIED
    cache.mkdir(parents=True, exist_ok=True)
    archive = horovod_build.fetch_sdist(cache, os.environ)
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB. On that machine: python3 -m benchmarks.gpu --carried {folder}")
