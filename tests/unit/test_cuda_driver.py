"""The GPU tests of the kernels' C interface, on the emulator behind a stand-in for the CUDA driver."""

from __future__ import annotations

import ctypes
import shutil
import types
from collections.abc import Iterator

import numpy as np
import pytest

from hvd_syncbn import native, protocol
from tests import cuda_emulator, cuda_kernels
from tests.arrays import same_bits
from tests.gpu import test_kernels
from tests.gpu.driver import Driver

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, and there is none"),
]


@pytest.fixture(autouse=True)
def driver() -> Iterator[Driver]:
    made = Driver(cuda_emulator.kernels(), str(cuda_emulator.driver()))
    before = cuda_kernels.use(made)
    cuda_emulator.configure(4, 0)
    yield made
    cuda_kernels.use(before)


@pytest.mark.parametrize("layout", native.LAYOUTS)
def test_masks(layout: str) -> None:
    for i, (n, c, s) in enumerate(test_kernels.FORMS):
        test_kernels.test_masks(n, c, s, protocol.DTYPES[i % 4], layout)


@pytest.mark.parametrize("parameter", protocol.DTYPES)
def test_weights_and_running_statistics(parameter: str) -> None:
    test_kernels.test_weights_and_running_statistics_of_every_type("bfloat16", parameter, "channels_last")


def test_65536_channels() -> None:
    test_kernels.test_65536_channels(5, 1, "channels_first")


def test_no_elements() -> None:
    test_kernels.test_no_elements()


def test_order_does_not_show() -> None:
    """Every launch runs its blocks and threads in another order."""
    for n, c, s in test_kernels.FORMS:
        shape = native.shape(n, c, s, "float32")
        x = np.random.default_rng(s).standard_normal((n, c, s)).astype(np.float32)
        want = native.forward_packet(shape, x, 1e-5)
        for _ in range(10):
            assert same_bits(cuda_kernels.forward_moments(shape, x, None, 1e-5), want)


def test_a_write_beside_an_array_is_found(driver: Driver) -> None:
    for outside in (-1, 8):
        array = np.zeros(2, np.int32)
        address = driver.give(array, True)
        ctypes.memset(address, 1, 8)
        ctypes.memset(address + outside, 1, 1)
        with pytest.raises(AssertionError, match=r"beside arrays of these shapes was overwritten: \[\(2,\)\]"):
            driver.take_back()


def test_what_a_kernel_does_not_write_is_found(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.zeros(2, np.int32)
    driver.give(array, True)
    driver.take_back()
    assert (array.view(np.uint8) == 0xA5).all()
    # Under initcheck the memory is as the allocation left it, or reads of it would not be found.
    monkeypatch.setenv("HVD_SYNCBN_INITCHECK", "1")
    other = Driver(cuda_emulator.kernels(), str(cuda_emulator.driver()))
    other.give(array, True)
    other.take_back()
    assert (array.view(np.uint8) == 0x3C).all()


def test_a_failed_call_leaves_no_array_behind(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one may have another array at the same address."""
    shape = native.shape(2, 3, 5, "float32")
    x = np.ones((2, 3, 5), np.float32)
    failing = {"hvd_syncbn_cuda_forward_moments": lambda *_: 1, "hvd_syncbn_cuda_error": lambda _: b"invalid value"}
    with monkeypatch.context() as patch:
        patch.setattr(driver, "library", lambda: types.SimpleNamespace(**failing))
        with pytest.raises(AssertionError, match="invalid value"):
            cuda_kernels.forward_moments(shape, x, None, 1e-5)
    x[...] = 2
    assert same_bits(cuda_kernels.forward_moments(shape, x, None, 1e-5), native.forward_packet(shape, x, 1e-5))


def test_an_error_of_the_driver_is_raised_in_its_words(driver: Driver) -> None:
    with pytest.raises(RuntimeError, match="cuMemAlloc_v2 failed with CUDA error 2: out of memory"):
        driver._call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(1 << 60))
