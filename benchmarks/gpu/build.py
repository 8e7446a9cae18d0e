"""Builds the core with its CUDA kernels and the PyTorch adapter for this machine's GPU, with CMake alone, into a folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"  # what to put on PYTHONPATH

_TOOLS = {
    "cmake": "CMake 3.18 or newer",
    "ninja": "ninja",
    "g++": "a C++17 compiler",
    "nvcc": "the CUDA compiler (its folder on PATH, often /usr/local/cuda/bin)",
}
_MODULES = ("torch", "numpy", "ml_dtypes", "pytest", "pytest_timeout", "setuptools", "rich")


def missing() -> list[str]:
    """What this machine lacks, for a person."""
    lacks = [f"{name}: {what}" for name, what in _TOOLS.items() if shutil.which(name) is None]
    lacks += [f"Python module {name}" for name in _MODULES if importlib.util.find_spec(name) is None]
    if not lacks:
        import torch

        if not torch.cuda.is_available():
            lacks.append(f"a GPU that PyTorch {torch.__version__} can use (torch.cuda.is_available() is False)")
    return lacks


def build(log: Path) -> None:
    """Configures, compiles and lays out a package of this checkout in `SITE`.

    Raises:
        RuntimeError: it failed; the message ends with the last lines of the log.
    """
    import torch

    major, minor = torch.cuda.get_device_capability()
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(BUILD / "cmake"), "-G", "Ninja"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_INSTALL_PREFIX={SITE}",
        "-DHVD_SYNCBN_CUDA=on",
        f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real",
    ]
    shutil.rmtree(SITE, ignore_errors=True)
    with log.open("w") as out:
        for command in (configure, ["cmake", "--build", configure[4]], ["cmake", "--install", configure[4]]):
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode:
                tail = "\n".join(log.read_text().splitlines()[-30:])
                raise RuntimeError(f"`{' '.join(command)}` failed. The end of {log}:\n{tail}")
    package = SITE / "hvd_syncbn"
    for source, target in (("hvd_syncbn", package), ("torch_impl", package / "torch_impl")):
        for path in (ROOT / source).glob("*.py"):
            shutil.copy(path, target)


def run(log: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> int:
    """Runs Python code of this checkout over the built package, its output on the screen and in `log`."""
    environment = {**os.environ, "PYTHONPATH": str(SITE)}
    # -P and the early import: the checkout's own hvd_syncbn has nothing built in it.
    command = [*prefix, sys.executable, "-P", *arguments]
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            out.write(line)
    return process.returncode


def pytest(log: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> int:
    """Runs the GPU tests."""
    code = "import sys, hvd_syncbn, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    return run(log, "-c", code, "-p", "no:cacheprovider", "-q", "tests/gpu", *arguments, prefix=prefix)
