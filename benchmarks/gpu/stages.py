"""The stages of `python -m benchmarks.gpu`. Each needs the build alone; their programs' output is in the folder of logs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu import carried
from benchmarks.gpu.processes import (
    BUILD,
    FAILED,
    HOROVOD,
    NOT_RUN,
    NOT_STARTED,
    OVER_TIME,
    PASSED,
    ROOT,
    SITE,
    Background,
    Result,
    Stage,
)
from hvd_syncbn import horovod_build

_FOR_A_BUILD = {
    "cmake": "CMake 3.18 or newer",
    "ninja": "ninja",
    "g++": "a C++17 compiler",
    "nvcc": "the CUDA compiler (its folder on PATH, often /usr/local/cuda/bin)",
}
_MACHINE_S = 60.0
_WORKERS = min(4, os.cpu_count() or 1)
# Without putting the checkout, which has a package without libraries, first on sys.path.
_PYTEST = ("-m", "pytest", "--import-mode=importlib", "-p", "no:cacheprovider", "-v")
_SANITIZED = ("memcheck", "racecheck", "synccheck", "initcheck", "memcheck of PyTorch")
_RANKS = {"NCCL_DEBUG": "INFO", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "30"}
_NO_POOL = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or memcheck sees one allocation for many tensors
_FOUND_ERRORS = 9  # the exit status of compute-sanitizer where it found some


def _main(module: str, *arguments: str) -> list[str]:
    """Options of Python that call the `main` of a module of this package, imported as others are."""
    return ["-c", f"from benchmarks.gpu import {module}; {module}.main()", *arguments]


_horovod: Background | None = None  # its build, beside the stages


def look(stage: Stage) -> dict[str, Any]:
    """Return what this machine has; found out once in a run.

    Raises:
        RuntimeError: PyTorch cannot be imported, or does not answer.
    """
    file = stage.logs / "machine.json"
    if not file.exists():
        status = stage.run("machine.log", "-m", "benchmarks.gpu.machine", str(file), limit=_MACHINE_S)
        if status:
            raise RuntimeError(f"this Python cannot tell what the machine has: {_ended(status)}: {stage.logs / 'machine.log'}")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _ended(status: int) -> str:
    return {OVER_TIME: "over its time limit", NOT_STARTED: "not started"}.get(status, f"exit status {status}")


def _no_gpu(stage: Stage) -> str:
    """Return why nothing can run on a GPU; empty if it can."""
    here = look(stage)
    return "" if here["gpu"] else f"needs an NVIDIA GPU, and PyTorch {here['torch']} sees none"


# ---- build


def build(stage: Stage) -> Result:
    """Lay out a package of this checkout: with the carried libraries, or with those that CMake builds; then Horovod."""
    here = look(stage)
    why = carried.reason_against(stage.carried, here)
    if not why:
        assert stage.carried is not None
        shutil.rmtree(SITE, ignore_errors=True)
        shutil.copytree(stage.carried / "site", SITE)
        lay_out(SITE / "hvd_syncbn")
        if status := _load(stage):
            why = f"the carried libraries could not be loaded ({_ended(status)}: {stage.logs / 'load.log'})"
    if why and (failure := _compile(stage, here)) is not None:
        return failure._replace(what=f"{failure.what} ({why})")
    whose = f"{here['gpu']}, compute capability {here['capability']}" if here["gpu"] else "no GPU"
    how = f"built here, because {why}" if why else "carried"
    try:
        horovod = _prepare_horovod(stage, here)
    except OSError as error:  # only the ranks stage needs it
        horovod = f"Horovod could not be installed: {error}"
    return Result(PASSED, f"for {whose}; PyTorch {here['torch']}; {how}; {horovod}")


def _compile(stage: Stage, here: dict[str, Any]) -> Result | None:
    """Build in `SITE`; return what failed, or None."""
    if lacks := [f"{name} ({what})" for name, what in _FOR_A_BUILD.items() if here["tools"][name] is None]:
        return Result(NOT_RUN, f"this machine lacks {', '.join(lacks)}")
    shutil.rmtree(SITE, ignore_errors=True)
    log = stage.logs / "build.log"
    architectures = f"{here['capability']}-real" if here["gpu"] else None
    for command in carried.configure(BUILD / "cmake", SITE, architectures):
        if status := stage.run(log.name, *command):
            lines = log.read_text(errors="replace").splitlines()
            said = "\n".join(lines[-3:] if status == OVER_TIME else horovod_build.first_error(lines))
            return Result(FAILED, f"{' '.join(command[:2])}: {_ended(status)}: {log}:\n{said}")
    lay_out(SITE / "hvd_syncbn")
    if status := _load(stage):
        return Result(FAILED, f"what was built cannot be loaded ({_ended(status)}): {stage.logs / 'load.log'}")
    return None


def lay_out(package: Path) -> None:
    """Copy what is not compiled: Python, and Horovod's patches."""
    not_these = shutil.ignore_patterns("csrc", "CMakeLists.txt", "__pycache__")
    shutil.copytree(ROOT / "hvd_syncbn", package, ignore=not_these, dirs_exist_ok=True)


def _load(stage: Stage) -> int:
    code = "from hvd_syncbn import native; import hvd_syncbn.torch; assert native.has_cuda(), 'built without CUDA'"
    return stage.run("load.log", "-c", code)


def _prepare_horovod(stage: Stage, here: dict[str, Any]) -> str:
    """Install the carried wheel, or start to build one; return which, in words."""
    global _horovod
    _horovod = None
    shutil.rmtree(HOROVOD, ignore_errors=True)  # of an earlier run, perhaps by another Python
    if here["horovod"]:
        return "Horovod is installed"
    if stage.carried is None:
        return "Horovod is not installed and was not carried"
    wheel = next((stage.carried / "wheels").glob("horovod-*.whl"), None)
    if wheel is not None and not _install_horovod(stage, wheel):
        return "Horovod was carried"
    options = ("-m", "hvd_syncbn.horovod_build", "--no-install", "--wheel-dir", str(BUILD / "wheels"))
    environment = {"HVD_SYNCBN_CACHE": str(stage.carried)}
    if here["gpu"]:
        environment["HOROVOD_BUILD_CUDA_CC_LIST"] = here["capability"]
    shutil.rmtree(BUILD / "wheels", ignore_errors=True)
    _horovod = stage.start("horovod_build.log", *options, environment=environment)
    return "Horovod is being built beside the other stages"


def _install_horovod(stage: Stage, wheel: Path) -> str:
    """Install a wheel into `HOROVOD` and load it; return what failed; empty if nothing did."""
    log = "horovod_install.log"
    options = ("--no-deps", "--no-index", "--no-compile", "--upgrade", "--target", str(HOROVOD))
    status = stage.run(log, "-m", "pip", "install", "-q", *options, str(wheel))
    # A wheel for another Python or PyTorch imports with a warning, and has no functions.
    status = status or stage.run(log, "-c", "from horovod.torch import init", path=[HOROVOD])
    return f"{wheel.name} cannot be used ({_ended(status)}): {stage.logs / log}" if status else ""


# ---- test


def test(stage: Stage) -> Result:
    """Compare the bytes of every kernel and the layer with the CPU's; replace a process whose GPU context breaks."""
    if missing := look(stage)["missing"]:
        return Result(NOT_RUN, f"this machine lacks the Python modules {', '.join(missing)}")
    log = stage.logs / "test.log"
    report = log.with_suffix(".xml")
    # A test that waits for a GPU in C code is ended by a thread alone, with its process.
    options = ("-n", str(_WORKERS), "-o", "timeout=100", "-o", "timeout_method=thread", f"--junitxml={report}")
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // _WORKERS))}
    status = stage.run(log.name, *_PYTEST, *options, "tests/gpu", environment=environment)
    if not report.exists():
        lines = log.read_text(errors="replace").splitlines()
        counts = {word: sum(f" {word} " in f" {line} " for line in lines) for word in ("PASSED", "FAILED")}
        so_far = f"{counts['PASSED']} tests had passed and {counts['FAILED']} failed"
        return Result(FAILED, f"pytest ended early ({_ended(status)}), {so_far}: {log}")
    cases = list(ET.parse(report).getroot().iter("testcase"))
    bad = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skips = [skip.get("message", "") for case in cases for skip in case.iter("skipped")]
    reasons = "; ".join(sorted(set(skips)))
    if status or bad:
        return Result(FAILED, f"{len(bad)} of {len(cases)} tests failed ({_ended(status)}), first {(bad or ['?'])[0]}: {log}")
    if len(skips) == len(cases):
        return Result(NOT_RUN, f"all {len(cases)} tests were skipped: {reasons}")
    return Result(PASSED, f"{len(cases) - len(skips)} tests" + (f"; {len(skips)} skipped: {reasons}" if skips else ""))


# ---- speed


def speed(stage: Stage) -> Result:
    """Measure the kernels beside their peers, a ResNet-50 step, and the host's time of a call."""
    if reason := _no_gpu(stage):
        return Result(NOT_RUN, reason)
    parts = {"speed": 0.6, "network": 1.0}  # of the time that is left
    said, failures = [], []
    for name, share in parts.items():
        status = stage.run(f"{name}.log", *_main(name, str(stage.logs)), limit=share * stage.left())
        figures = stage.logs / f"{name}.json"
        if status:
            so_far = f", figures so far in {figures}" if figures.exists() else ""
            failures.append(f"{name}: {_ended(status)}{so_far}: {stage.logs / name}.log")
        if figures.exists():
            said.append(json.loads(figures.read_text())["summary"])
    return _joined(failures, said)


def _joined(failures: list[str], said: list[str]) -> Result:
    return Result(FAILED if failures else PASSED, "; ".join([*failures, *said]))


# ---- ranks


def ranks(stage: Stage) -> Result:
    """Run `verify` alone, NCCL at size 1, 2 ranks on one GPU, and 2 GPUs if there are."""
    if reason := _no_gpu(stage):
        return Result(NOT_RUN, reason)
    here = look(stage)
    if not here["horovod"] and not HOROVOD.exists():
        if _horovod is None:
            return Result(NOT_RUN, "Horovod is not installed and was not carried: --prepare, then --carried")
        if status := _horovod.wait(stage.left()):
            return Result(FAILED, f"Horovod was not built ({_ended(status)}): {_horovod.log}")
        if failure := _install_horovod(stage, next((BUILD / "wheels").glob("horovod-*.whl"))):
            return Result(FAILED, failure)
    two_ranks = ["horovodrun", "-np", "2", "-H", "localhost:2", sys.executable]
    programs = {"verify alone": ["-m", "hvd_syncbn.cli", "verify"]}
    for asynchronous in ("0", "1"):
        programs[f"NCCL, asynchronous completion {asynchronous}"] = _main("nccl", asynchronous)
    programs["2 ranks on one GPU"] = [*two_ranks, *_main("share_gpu")]
    if here["gpus"] >= 2:
        programs["2 GPUs"] = [*two_ranks, *_main("two_gpus")]
    said, failures = [], []
    for name, command in programs.items():
        log = f"ranks_{name.replace(' ', '_').replace(',', '')}.log"
        # Two ranks on the first GPU, also where there are more.
        environment = _RANKS | ({"CUDA_VISIBLE_DEVICES": "0"} if name == "2 ranks on one GPU" else {})
        status = stage.run(log, *command, path=[HOROVOD], environment=environment)
        if status:
            failures.append(f"{name}: {_ended(status)}: {stage.logs / log}")
        else:
            said.append(name)
    if here["gpus"] < 2:
        said.append("2 GPUs not run: one is here")
    return _joined(failures, said)


# ---- sanitize


def sanitize(stage: Stage) -> Result:
    """Run compute-sanitizer's tools over the C interface, and memcheck over PyTorch without its memory pool."""
    sanitizer = look(stage)["tools"]["compute-sanitizer"]
    if (reason := _no_gpu(stage)) or sanitizer is None:
        return Result(NOT_RUN, reason or "compute-sanitizer is not on PATH")

    def check(name: str) -> int:
        tool = name.partition(" ")[0]
        prefix = [sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND_ERRORS), "--print-limit", "50"]
        log = f"{name.replace(' ', '_')}.log"
        if name == tool:
            environment = {"HVD_SYNCBN_INITCHECK": "1"} if tool == "initcheck" else {}
            return stage.run(log, *prefix, sys.executable, *_main("launches", "check"), environment=environment)
        prefix += ["--report-api-errors", "no"]  # PyTorch makes calls that may fail
        tests = ("tests/gpu/test_torch.py", "-k", "small_steps")
        return stage.run(log, *prefix, sys.executable, *_PYTEST, *tests, environment=_NO_POOL)

    with ThreadPoolExecutor(len(_SANITIZED)) as pool:
        found = dict(zip(_SANITIZED, pool.map(check, _SANITIZED), strict=True))
    for name, status in found.items():
        # Several at the same time may disturb one another.
        if status not in (0, _FOUND_ERRORS, OVER_TIME):
            found[name] = check(name)
    failures = []
    for name, status in found.items():
        words = "found errors" if status == _FOUND_ERRORS else _ended(status)
        failures += [f"{name}: {words}: {stage.logs / name.replace(' ', '_')}.log"] if status else []
    clean = [name for name, status in found.items() if status == 0]
    return _joined(failures, [f"clean: {', '.join(clean)}"] if clean else [])


# ---- profile


def profile(stage: Stage) -> Result:
    """Run Nsight Compute over eight kernels: all four in both layouts."""
    ncu = look(stage)["tools"]["ncu"]
    if (reason := _no_gpu(stage)) or ncu is None:
        return Result(NOT_RUN, reason or "ncu is not on PATH")
    report = stage.logs / "profile.ncu-rep"
    # Other users of the machine share its clocks.
    options = ["--clock-control", "none", "--set", "full", "--force-overwrite", "--export", str(report.with_suffix(""))]
    program = [sys.executable, *_main("launches", "profile")]
    if status := stage.run("profile.log", ncu, *options, *program):
        return Result(FAILED, f"ncu: {_ended(status)}: {stage.logs / 'profile.log'}")
    if status := stage.run("profile.txt", ncu, "--import", str(report), "--page", "details"):
        return Result(FAILED, f"ncu --import: {_ended(status)}: {stage.logs / 'profile.txt'}")
    return Result(PASSED, f"{stage.logs / 'profile.txt'}")
