"""The native libraries and Horovod for a machine without a network, built here for its GPU, Python and PyTorch.

`--prepare FOLDER` makes in FOLDER:
    site/          the native libraries of this package, for compute capability 9.0
    wheels/        Horovod with NCCL, for the same GPU
    horovod/       Horovod's source, to build it there if the wheel does not fit
    carried.json   what the libraries and the wheel were built for
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.processes import ROOT
from hvd_syncbn import horovod_build
from hvd_syncbn.horovod_build.system import cuda_frameworks, framework_versions

ARCHITECTURE = "90"
MEGABYTES = 64
"""The limit of what travels to this project's GPU machine, the checkout included."""

_CHECKOUT_MEGABYTES = 4


def digest() -> str:
    """Return the SHA-256 of all files that the native libraries are built from."""
    paths = [ROOT / "CMakeLists.txt", ROOT / "torch_impl" / "CMakeLists.txt", ROOT / "torch_impl" / "find_torch.py"]
    paths += [path for folder in ("hvd_syncbn/csrc", "torch_impl/csrc") for path in (ROOT / folder).rglob("*")]
    result = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        result.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return result.hexdigest()


def reason_against(folder: Path | None, here: dict[str, Any]) -> str:
    """Return why the carried libraries cannot be used on this machine; empty if they can.

    Args:
        folder: what `prepare` made, or None.
        here: what `machine.look` returned.
    """
    if folder is None:
        return "nothing was carried"
    try:
        built: dict[str, str] = json.loads((folder / "carried.json").read_text())
    except (OSError, ValueError):
        return f"{folder} has no libraries"
    wanted = {"torch": here["torch"], "python": here["python"], "platform": here["platform"], "sources": digest()}
    if here["gpu"] is not None:
        wanted["architecture"] = here["capability"]
    different = [
        f"{name} {built.get(name)}, and here it is {value}" for name, value in wanted.items() if built.get(name) != value
    ]
    return f"the carried libraries were built for {'; '.join(different)}" if different else ""


def configure(build: Path, prefix: Path, architectures: str | None) -> list[list[str]]:
    """Return the commands that build the native libraries and install them below a prefix."""
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={prefix}", "-DHVD_SYNCBN_CUDA=on"]
    if architectures is not None:
        options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
    return [
        ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options],
        ["cmake", "--build", str(build)],
        ["cmake", "--install", str(build), "--strip"],
    ]


def prepare(folder: Path) -> None:
    """Fetch Horovod's source, and build what this Python's PyTorch allows.

    Raises:
        subprocess.CalledProcessError: a build failed.
    """
    cache = folder / "horovod"
    cache.mkdir(parents=True, exist_ok=True)
    horovod_build.fetch_sdist(cache, os.environ)
    (folder / "carried.json").unlink(missing_ok=True)
    torch = framework_versions().get("torch")
    if "torch" in cuda_frameworks():
        _build(folder)
        print(f"Built for PyTorch {torch}, {sys.implementation.cache_tag} and compute capability {ARCHITECTURE}.")
    else:
        print(
            f"PyTorch {torch} of {sys.executable} is no build for CUDA: only Horovod's source was fetched. "
            "The GPU machine has to build. To build here, run this with the GPU machine's versions of Python and PyTorch."
        )
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    print(f"{folder}: {size:.1f} MB. On the GPU machine: python3 -m benchmarks.gpu --carried {folder}")
    if size > MEGABYTES - _CHECKOUT_MEGABYTES:
        raise ValueError(
            f"expected at most {MEGABYTES - _CHECKOUT_MEGABYTES} MB beside the checkout. Received: {size:.1f} MB in {folder}"
        )


def _build(folder: Path) -> None:
    site, wheels = folder / "site", folder / "wheels"
    for made in (site, wheels):
        shutil.rmtree(made, ignore_errors=True)
    # Outside the folder, which travels; kept, so that a second run compiles what has changed.
    build = ROOT / "build" / "gpu-carried"
    for command in configure(build, site, f"{ARCHITECTURE}-real"):
        subprocess.run(command, check=True)
    environment = os.environ | {"HOROVOD_BUILD_CUDA_CC_LIST": ARCHITECTURE}
    options = ["--with-nccl", "--no-install", "--wheel-dir", str(wheels)]
    subprocess.run([sys.executable, "-m", "hvd_syncbn.horovod_build", *options], env=environment, cwd=ROOT, check=True)
    versions = framework_versions()
    about = {**machine.python(), "torch": versions["torch"], "architecture": ARCHITECTURE, "sources": digest()}
    (folder / "carried.json").write_text(json.dumps(about, indent=1) + "\n")
