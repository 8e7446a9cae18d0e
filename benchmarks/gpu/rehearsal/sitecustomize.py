"""Found by every Python of a rehearsal at its start: changes modules behind their import. See __init__.py."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def _torch(torch: Any) -> None:
    importlib.import_module("stand_in").install(torch)


def _native(native: Any) -> None:
    native.has_cuda = lambda: True


def _ops(ops: Any) -> None:
    ops.HAS_CUDA = False  # there is no operator to ask for errors


def _driver(driver: Any) -> None:
    driver.Driver.__init__.__defaults__ = (
        os.environ["HVD_SYNCBN_REHEARSAL_KERNELS"],
        os.environ["HVD_SYNCBN_REHEARSAL_DRIVER"],
    )


def _horovod(hvd: Any) -> None:
    hvd.nccl_built = lambda: True


def _smaller(**values: Any) -> Callable[[Any], None]:
    return lambda module: vars(module).update(values)


CHANGES: dict[str, Callable[[Any], None]] = {
    "torch": _torch,
    "hvd_syncbn.native": _native,
    "hvd_syncbn.torch_impl.ops": _ops,
    "tests.gpu.driver": _driver,
    "horovod.torch": _horovod,
    "benchmarks.gpu.speed": _smaller(SHAPES=[(3, 5, 5)], BATCHES=(2,), ROUNDS=3),
    "benchmarks.gpu.network": _smaller(BATCH=2, IMAGE=32, STEPS=1, WARM_UP=1, CALLS=3),
    "benchmarks.gpu.launches": _smaller(CHECKED=[(3, 3, 1), (2, 3, 65)], PROFILED=(2, 4, 65)),
}


class _Changing(importlib.abc.Loader):
    def __init__(self, loader: Any, change: Callable[[Any], None]) -> None:
        self._loader, self._change = loader, change

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._change(module)

    def __getattr__(self, name: str) -> Any:  # pkgutil and runpy ask loaders for more
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in CHANGES or fullname in self._busy:
            return None
        self._busy.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Changing(spec.loader, CHANGES[fullname])
        return spec


# An editable install would come before the package that the build stage lays out.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "_editable_skbc_hvd_syncbn"]
sys.meta_path.insert(0, _Finder())
