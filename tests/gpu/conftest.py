"""For the tests on a GPU: skips them where there is none, and stands in for a Horovod that is not installed, at size 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from benchmarks.gpu import size_one


def _reason() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return f"needs an NVIDIA GPU, and PyTorch {torch.__version__} sees none"
    from hvd_syncbn import native

    return None if native.has_cuda() else "hvd-syncbn was built without CUDA"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.path.parent == Path(__file__).parent]
    reason = _reason() if mine else None
    for item in mine:
        item.add_marker("gpu")
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """End a worker of pytest-xdist whose GPU context a kernel has broken, so that the next test gets a new process."""
    yield
    if "PYTEST_XDIST_WORKER" not in os.environ or _reason() is not None:
        return
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{item.nodeid} broke the GPU context, and its process ends: {error}", file=sys.stderr, flush=True)
        os._exit(1)


@pytest.fixture(autouse=True)
def _horovod(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in size_one.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
