"""A plugin for the pytest of a rehearsal: makes tests small, and leaves out those of what a stand-in has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALLER: dict[str, dict[str, Any]] = {
    "test_large": {"SHAPE": (3, 2, 65), "GIB": 0},
    "test_repeats": {"REPEATS": 6},
    "test_kernels": {"PAIRS": (16, 64, 65)},
}
# Streams that are late, graphs, errors that the GPU finds, a second device, thousands of channels in the emulator.
LEFT_OUT = (
    "test_current_stream",
    "test_cuda_graph",
    "wrong_packet",
    "test_one_value",
    "another_device",
    "test_another_call",
    "test_65536_channels",
)
AT_MOST = 2
"""Cases of a parametrized test."""


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Choose the tests and change their modules."""
    import hvd_syncbn
    from benchmarks.gpu.processes import SITE

    assert Path(hvd_syncbn.__file__ or "").is_relative_to(SITE), f"expected the built package. Received: {hvd_syncbn.__file__}"
    seen: dict[str, int] = {}
    kept: list[Any] = []
    left_out: list[Any] = []
    for item in items:
        vars(item.module).update(SMALLER.get(item.module.__name__.rpartition(".")[2], {}))
        name = item.nodeid.partition("[")[0]
        seen[name] = seen.get(name, 0) + 1
        wanted = seen[name] <= AT_MOST and not any(part in name for part in LEFT_OUT)
        (kept if wanted else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
