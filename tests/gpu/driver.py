"""A GPU's memory by the CUDA driver alone, for the kernels' C interface (tests/cuda_kernels.py).

Every array gets an allocation of its own with bytes around it that are checked, so it needs no PyTorch, whose memory pool
hides accesses out of bounds from compute-sanitizer.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

GUARD = 256  # bytes on both sides
_GUARD_BYTE, _OLD_BYTE = 0x5A, 0xA5


class _Given(NamedTuple):
    array: NDArray[Any]
    base: int
    before: int  # bytes between the allocation's start and the array
    whole: int  # bytes of the allocation


class Driver:
    """The first GPU.

    Args:
        kernels: libhvd_syncbn.so, or None for the installed one.
        driver: the driver's library.

    With ``HVD_SYNCBN_INITCHECK=1`` the memory of outputs is left as it is allocated, so that compute-sanitizer's initcheck
    finds reads of it. Otherwise it is filled with a pattern, so that what a kernel does not write is found.
    """

    def __init__(self, kernels: Path | None = None, driver: str = "libcuda.so.1") -> None:
        if kernels is None:
            from hvd_syncbn import native

            kernels = native.find("libhvd_syncbn.so")
        self._kernels = ctypes.CDLL(str(kernels))
        self._cuda = ctypes.CDLL(driver)
        self._fills_outputs = os.environ.get("HVD_SYNCBN_INITCHECK") != "1"
        self._given: dict[tuple[int, int], _Given] = {}
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        # The primary context is the one that the kernels' CUDA runtime takes.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._cuda, name)(*arguments)
        if error:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(ctypes.c_int(error), ctypes.byref(text))
            raise RuntimeError(f"{name} failed with CUDA error {error}: {(text.value or b'unknown').decode()}")

    def library(self) -> ctypes.CDLL:
        """The kernels."""
        return self._kernels

    def give(self, array: NDArray[Any], is_output: bool) -> int:
        """Copy an array to the GPU, to an address of the same alignment; an output's memory is allocated and not copied."""
        key = array.ctypes.data, array.nbytes
        if key not in self._given:
            before = GUARD + array.ctypes.data % 64
            whole = before + array.nbytes + GUARD
            base = ctypes.c_uint64()
            self._call("cuMemAlloc_v2", ctypes.byref(base), ctypes.c_size_t(whole))
            given = _Given(array, int(base.value), before, whole)
            self._fill(given.base, _GUARD_BYTE, before)
            self._fill(given.base + before + array.nbytes, _GUARD_BYTE, GUARD)
            if not is_output:
                source = ctypes.c_void_p(array.ctypes.data)
                self._copy("HtoD", ctypes.c_uint64(given.base + before), source, array.nbytes)
            elif self._fills_outputs:
                self._fill(given.base + before, _OLD_BYTE, array.nbytes)
            self._given[key] = given
        given = self._given[key]
        return given.base + given.before

    def take_back(self) -> None:
        """Wait for the GPU, copy everything back, check the bytes around it, and free it."""
        whole, self._given = self._given, {}  # none is left for the next call, whatever fails
        self._call("cuCtxSynchronize")
        overwritten = []
        for given in whole.values():
            array = given.array
            self._copy("DtoH", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(given.base + given.before), array.nbytes)
            around = np.empty(given.before + GUARD, np.uint8)
            address = around.ctypes.data
            after = given.base + given.before + array.nbytes
            self._copy("DtoH", ctypes.c_void_p(address), ctypes.c_uint64(given.base), given.before)
            self._copy("DtoH", ctypes.c_void_p(address + given.before), ctypes.c_uint64(after), GUARD)
            if (around != _GUARD_BYTE).any():
                overwritten.append(array.shape)
            self._call("cuMemFree_v2", ctypes.c_uint64(given.base))
        assert not overwritten, f"memory beside arrays of these shapes was overwritten: {overwritten}"

    def _fill(self, address: int, byte: int, size: int) -> None:
        if size:
            self._call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(byte), ctypes.c_size_t(size))

    def _copy(self, direction: str, target: Any, source: Any, size: int) -> None:
        if size:
            self._call(f"cuMemcpy{direction}_v2", target, source, ctypes.c_size_t(size))
