"""For the tests on a GPU: skips them where there is none, and stands in for a Horovod that is not installed, at size 1."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest


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


@pytest.fixture(autouse=True)
def _horovod(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("horovod") is not None:
        import horovod.torch

        horovod.torch.init()
    else:
        stub = types.SimpleNamespace(is_initialized=lambda: True, size=lambda: 1)
        monkeypatch.setitem(sys.modules, "horovod", types.ModuleType("horovod"))
        monkeypatch.setitem(sys.modules, "horovod.torch", stub)
