"""Which frameworks are here: tests run with one of them, too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def need(*names: str) -> None:
    """Skips the test if one is not installed: "torch", "keras", ...; "horovod.torch" is a Horovod built for PyTorch."""
    for name in names:
        package, _, framework = name.partition(".")
        spec = importlib.util.find_spec(package)
        if spec is None:
            pytest.skip(f"needs {package}")
        # Imports nothing: the ranks of a job do.
        folders = [Path(folder) / framework for folder in spec.submodule_search_locations or ()]
        if framework and not any([*folder.glob("mpi_lib*.so")] for folder in folders):
            pytest.skip(f"needs a Horovod built for {framework}")
