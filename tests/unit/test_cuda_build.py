"""The CUDA kernels and what calls them compile, for one architecture. No framework here uses CUDA, so nothing else does it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["hvd_syncbn_cuda", *(f"{room}/CMakeFiles/hvd_syncbn_{name}.dir/csrc/cuda.cc.o" for room, name in
                              (("torch_impl", "torch"), ("tf_impl", "tf")))]  # fmt: skip


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.timeout(900)
def test_everything_of_cuda_compiles(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = ["-DHVD_SYNCBN_CUDA=on", "-DCMAKE_CUDA_ARCHITECTURES=90-real", f"-DPython_EXECUTABLE={sys.executable}"]
    # Little optimization: 2 s for a kernel source instead of 12. test_cuda_registers.py fails unless all have been compiled
    # with full optimization since the last change.
    described = subprocess.run(["nvcc", "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
    options.append(f"-DCMAKE_CUDA_FLAGS={'-Ofc=max' if '--Ofast-compile' in described else '-Xptxas=-O0'}")
    for command in (
        ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path), *options],
        ["ninja", "-C", str(tmp_path), "-j", "2", *PARTS],
    ):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850, check=False)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
