"""Write what this machine has to a file: `python -m benchmarks.gpu.machine FILE`. A program of its own: PyTorch may hang."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

# What the stages import.
_MODULES = ("numpy", "ml_dtypes", "pytest", "pytest_timeout", "xdist", "setuptools", "rich")
_TOOLS = ("cmake", "ninja", "g++", "nvcc", "nvidia-smi", "compute-sanitizer", "ncu")


def python() -> dict[str, str]:
    """Return what decides whether a Python extension can be loaded, besides PyTorch."""
    return {"python": f"{sys.implementation.cache_tag}", "platform": sysconfig.get_platform()}


def look() -> dict[str, Any]:
    """Return everything that a stage needs to know."""
    import torch

    found: dict[str, Any] = {
        **python(),
        "libc": " ".join(platform.libc_ver()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": None,
        "gpus": 0,
        "missing": [name for name in _MODULES if importlib.util.find_spec(name) is None],
        "horovod": importlib.util.find_spec("horovod") is not None,
        "tools": {name: shutil.which(name) for name in _TOOLS},
    }
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "capability": f"{major}{minor}"}
    return found


def main() -> None:
    """Write the file, and print it with what nvidia-smi says."""
    found = look()
    text = json.dumps(found, indent=1)
    Path(sys.argv[1]).write_text(text + "\n")
    print(text, flush=True)
    if found["tools"]["nvidia-smi"]:
        subprocess.run(["nvidia-smi"], check=False, timeout=20)


if __name__ == "__main__":
    main()
