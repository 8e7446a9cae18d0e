"""The kernels' C interface on a GPU gives the bytes of the CPU core: what PyTorch never passes, masks and 16-bit vectors, too.

tests/unit/test_cuda_driver.py runs the same functions on the emulator.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from hvd_syncbn import native, protocol
from tests import cuda_kernels
from tests.cuda_steps import frozen_step, step
from tests.gpu.driver import Driver

# One of every form of the moment kernels in either layout, and of the apply kernels: 2-D, 7x7, short and long rows.
FORMS = [(130, 33, 1), (9, 72, 49), (3, 33, 100), (2, 5, 4097), (40, 8, 64)]

# Two channels per thread, which needs four items per multiprocessor.
PAIRS = (1100, 64, 65)


@pytest.fixture(autouse=True, scope="module")
def _on_the_gpu() -> Iterator[None]:
    before = cuda_kernels.use(Driver())
    yield
    cuda_kernels.use(before)


@pytest.mark.parametrize("layout", native.LAYOUTS)
@pytest.mark.parametrize("dtype", protocol.DTYPES)
@pytest.mark.parametrize(("n", "c", "s"), FORMS)
def test_masks(n: int, c: int, s: int, dtype: str, layout: str) -> None:
    for relu, misaligned in itertools.product((False, True), repeat=2):
        step(n, c, s, dtype, layout, n + s, relu=relu, masked=True, misaligned=misaligned)


@pytest.mark.parametrize("layout", native.LAYOUTS)
@pytest.mark.parametrize("parameter", protocol.DTYPES)
@pytest.mark.parametrize("dtype", protocol.DTYPES)
def test_weights_and_running_statistics_of_every_type(dtype: str, parameter: str, layout: str) -> None:
    for n, c, s in FORMS:
        step(n, c, s, dtype, layout, c + s, relu=True, parameter=parameter)


@pytest.mark.parametrize("layout", native.LAYOUTS)
@pytest.mark.parametrize("dtype", protocol.DTYPES)
def test_frozen(dtype: str, layout: str) -> None:
    for (n, c, s), parameter in itertools.product(FORMS, protocol.DTYPES):
        frozen_step(n, c, s, dtype, layout, c + s, relu=s % 2 == 1, parameter=parameter)


@pytest.mark.parametrize("layout", native.LAYOUTS)
@pytest.mark.parametrize(("n", "s"), [(5, 1), (1, 3), (1, 65)])
def test_65536_channels(n: int, s: int, layout: str) -> None:
    step(n, 65_536, s, "bfloat16", layout, s)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_two_channels_per_thread(dtype: str, relu: bool) -> None:
    step(*PAIRS, dtype, "channels_last", 0, relu=relu)


def test_no_elements() -> None:
    for shape in ((0, 7, 3), (3, 5, 0), (0, 1, 1)):
        for layout in native.LAYOUTS:
            step(*shape, "float32", layout, 0)
