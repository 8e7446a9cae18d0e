"""A stand-in for Horovod at size 1: the kernels' tests and figures need none."""

from __future__ import annotations

import importlib.util
import types


def modules() -> dict[str, types.ModuleType]:
    """Return what to put into sys.modules; initialize Horovod and return nothing where it is installed."""
    if importlib.util.find_spec("horovod") is not None:
        import horovod.torch

        horovod.torch.init()
        return {}
    alone = types.ModuleType("horovod.torch")
    alone.is_initialized = lambda: True  # type: ignore[attr-defined]
    alone.size = lambda: 1  # type: ignore[attr-defined]
    return {"horovod": types.ModuleType("horovod"), "horovod.torch": alone}
