"""Finds the compiler, CUDA, NCCL and MPI of this machine, and which frameworks are CUDA builds.

Reads files and runs compilers with ``--version``; imports no framework.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from hvd_syncbn.horovod_build.patching import BuildError

_USUAL_CUDA = Path("/usr/local/cuda")
_USUAL_NCCL = (Path("/usr/local"), Path("/usr"))


class Found(NamedTuple):
    """The folder and version of a system library. A binary depends on the version, not on the folder."""

    home: Path
    version: str


def framework_versions() -> dict[str, str]:
    """Return the versions of the frameworks installed in this Python, without importing them."""
    versions = {}
    torch = _text("torch", "version.py")
    if torch is not None:
        # Not the distribution's version, which omits the CUDA version of the build.
        match = re.search(r"^__version__ = '(.+)'$", torch, re.MULTILINE)
        versions["torch"] = match[1] if match else importlib.metadata.version("torch")
    if importlib.util.find_spec("tensorflow") is not None:
        versions["tensorflow"] = importlib.metadata.version(_owner_of("tensorflow"))
    return versions


def framework_owners() -> list[str]:
    """Return the packages that provide the installed frameworks: tensorflow, tensorflow-cpu, tf-nightly, ..."""
    return [_owner_of(name) for name in ("torch", "tensorflow") if importlib.util.find_spec(name) is not None]


def _owner_of(module: str) -> str:
    return importlib.metadata.packages_distributions()[module][0]


def cuda_frameworks() -> list[str]:
    """Return the installed frameworks that are CUDA builds."""
    torch = _text("torch", "version.py") or ""
    tensorflow = _text("tensorflow", "python/platform/build_info.py") or ""
    found = {
        "torch": re.search(r"^cuda\b.*= '", torch, re.MULTILINE),
        "tensorflow": re.search(r"'is_cuda_build', True", tensorflow),
    }
    return [name for name, match in found.items() if match]


def _text(package: str, file: str) -> str | None:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    return path.read_text() if path.exists() else None


def find_compiler(environ: Mapping[str, str]) -> str:
    """Return the version line of the C++ compiler that CMake will use."""
    candidates = [environ["CXX"].split()[0]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        path = shutil.which(candidate, path=environ.get("PATH"))
        if path:
            return _said_by([path, "--version"]).partition("\n")[0]
    raise BuildError(f"No C++ compiler was found. Searched: {', '.join(candidates)}. Install one: apt-get install g++")


def find_cuda(environ: Mapping[str, str]) -> Found | None:
    """Return the CUDA toolkit that a variable names, else that of the nvcc in PATH, else the one in /usr/local/cuda.

    Raises:
        BuildError: A variable names a folder without a compiler.
    """
    for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            found = _toolkit(Path(environ[name]))
            if found is None:
                raise BuildError(
                    f"{name}={environ[name]} is not a CUDA toolkit: it has no working bin/nvcc. Correct or unset {name}."
                )
            return found
    return next(filter(None, map(_toolkit, _cuda_homes(environ))), None)


def _cuda_homes(environ: Mapping[str, str]) -> Iterator[Path]:
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc:
        # nvcc may be a script or a link outside the toolkit's folder, but it prints the path of its toolkit.
        match = re.search(r"^#\$ TOP=(.+)$", _said_by([nvcc, "--dryrun", "-x", "cu", "/dev/null"]), re.MULTILINE)
        yield Path(match[1]) if match else Path(nvcc).resolve().parents[1]
    yield _USUAL_CUDA


def _toolkit(home: Path) -> Found | None:
    nvcc = home / "bin" / "nvcc"
    match = re.search(r"\bV(\d+(\.\d+)+)", _said_by([str(nvcc), "--version"])) if nvcc.exists() else None
    return Found(home.resolve(), match[1]) if match else None


def find_nccl(environ: Mapping[str, str], cuda: Found | None) -> Found | None:
    """Return the NCCL with its header that a variable names, else pip's package (required by PyTorch), else the system's.

    Raises:
        BuildError: A variable names a folder without the header.
    """
    for name, header in (("HOROVOD_NCCL_INCLUDE", "nccl.h"), ("HOROVOD_NCCL_HOME", "include/nccl.h")):
        if environ.get(name):
            found = _nccl(Path(environ[name]), header)
            if found is None:
                raise BuildError(f"{name}={environ[name]} is not NCCL's folder: it has no {header}. Correct or unset {name}.")
            return found
    homes = [*_of_pip(), *([cuda.home] if cuda else []), *_USUAL_NCCL]
    return next(filter(None, map(_nccl, homes)), None)


def _of_pip() -> list[Path]:
    nvidia = importlib.util.find_spec("nvidia")
    return [Path(folder, "nccl") for folder in (nvidia.submodule_search_locations or ())] if nvidia else []


def _nccl(home: Path, header: str = "include/nccl.h") -> Found | None:
    path = home / header
    if not path.exists():
        return None
    text = path.read_text(errors="replace")
    numbers = [re.search(rf"^#define NCCL_{part} +(\d+)", text, re.MULTILINE) for part in ("MAJOR", "MINOR", "PATCH")]
    return Found(home, ".".join(number[1] if number else "?" for number in numbers))


def find_mpi(environ: Mapping[str, str]) -> Found | None:
    """Return the MPI whose compiler is in PATH."""
    mpicxx = shutil.which("mpicxx", path=environ.get("PATH"))
    if mpicxx is None:
        return None
    # Open MPI's wrapper accepts the first option, MPICH's the second.
    said = next(filter(None, (_said_by([mpicxx, option]) for option in ("--showme:version", "-v"))), "")
    return Found(Path(mpicxx).parent, re.sub(r"^\S*mpicxx:? *", "", said.partition("\n")[0]))


def _said_by(command: list[str]) -> str:
    """Return the output of a command; an empty string if it fails."""
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return result.stdout if result.returncode == 0 else ""
