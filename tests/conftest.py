"""Before any test module; and tests of what is not installed are skipped, with what they lack as the reason."""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# Inductor imports setuptools, which refuses where the standard library's distutils came first.
import setuptools  # noqa: F401

from tests.parallel.fork_server import GC_THRESHOLD

with contextlib.suppress(ImportError):
    import triton  # noqa: F401  # what PyTorch for CUDA brings crashes at its import if TensorFlow came first

# Inductor would start a process that imports PyTorch, in every process that compiles, to compile kernels in parallel.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

ROOT = Path(__file__).parents[1]
SOURCES = (
    "test_cuda_build.py",
    "test_cuda_emulated.py",
    "test_cuda_driver.py",
    "test_cuda_registers.py",
)  # compile them; others: the marker
OPTIONAL = "torch|tensorflow|keras|horovod|matplotlib|scipy|sklearn|onnx|onnxruntime|onnxscript"

# With xdist a file's tests run in one process. So do all tests of these files: the former share jobs, the latter hosts.
TOGETHER = ("tests/parallel/test_(torch|tensorflow|same_bits).py", "tests/cluster/.*")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute files, or groups of files, over xdist's processes."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((group for group in TOGETHER if re.fullmatch(group, file)), file)

    return Scheduler(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Where a test module's import ends at a package that one need not have, the module is skipped."""
    report = yield
    if report.failed and isinstance(collector, pytest.Module):
        text = str(report.longrepr)
        missing = re.search(rf"ModuleNotFoundError: No module named '({OPTIONAL})\b", text)
        unbuilt = re.search(r"ImportError: Extension horovod\.(torch|tensorflow) has not been built", text)
        lacking = missing[1] if missing else unbuilt and f"a Horovod built for {unbuilt[1]}"
        if lacking:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 1, f"Skipped: needs {lacking}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Keep the garbage collector from going through the million objects that imports and the collection of tests make."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLD)
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of an installed package have its sources nowhere near; see tools/try_wheel.sh."""
    if not (ROOT / "CMakeLists.txt").exists():
        for item in items:
            if item.path.name in SOURCES or item.get_closest_marker("sources"):
                item.add_marker(pytest.mark.skip(reason="needs the package's sources"))
