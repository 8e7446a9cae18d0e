"""Stand-ins for a GPU and its tools, so that every line of the stages runs on a machine without one.

`environment` puts two folders first: this one on PYTHONPATH, whose sitecustomize.py makes PyTorch run "cuda" on the CPU and
gives the kernels' C interface the emulator (tests/cuda_emulator); and tools/ on PATH, for nvcc, CMake and NVIDIA's programs.
"""

from __future__ import annotations

import os
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def environment() -> dict[str, str]:
    """What the programs of a rehearsal get besides the environment."""
    from hvd_syncbn import native
    from tests import cuda_emulator

    return {
        "PYTHONPATH": str(_HERE),
        "PATH": os.pathsep.join([str(_HERE / "tools"), os.environ.get("PATH", "")]),
        "HVD_SYNCBN_REHEARSAL_CORE": str(native.find("libhvd_syncbn.so")),
        "HVD_SYNCBN_REHEARSAL_TORCH": str(native.find("torch_impl/libhvd_syncbn_torch.so").parent),
        "HVD_SYNCBN_REHEARSAL_KERNELS": str(cuda_emulator.kernels()),
        "HVD_SYNCBN_REHEARSAL_DRIVER": str(cuda_emulator.driver()),
        "PYTEST_ADDOPTS": "-p smaller_tests",
        "OMP_NUM_THREADS": "1",
    }
