"""The PyTorch layer in one process: the reference's bytes on every path, for any number of threads and any memory layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from torch import Tensor

from hvd_syncbn import native, protocol, vectors
from hvd_syncbn.cli.stacks import torch_stack
from hvd_syncbn.torch import SyncBatchNorm
from hvd_syncbn.torch_impl import ops
from tests.arrays import hostile
from tests.torch_tools import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_same,
    in_layout,
    isa,
    randn,
    randomize,
    reference_step,
    step,
    threads,
    to_torch,
)


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()
    assert hvd.size() == 1


def large(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """`(x, dy, residual)` of 800 KiB in float32: a dozen tasks, whose grain is 64 KiB. With tails in every dimension."""
    return tuple(randn(seed, 3, 67, 31, 33, dtype=dtype) for seed in range(3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("nonfinite", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_equals_reference(dtype: str, nonfinite: bool, relu: bool, layout: str) -> None:
    shape = 3, 5, 7, 2
    rng = np.random.default_rng(protocol.DTYPES.index(dtype))
    values = [hostile(rng, shape, dtype, nonfinite and i == 0) for i in range(3)]
    layer = randomize(SyncBatchNorm(5, activation="relu" if relu else None))
    (want,) = reference_step([values], layer, dtype)
    assert_same(step(layer, *(in_layout(to_torch(v, dtype), layout) for v in values)), want)


def test_one_core_for_python_and_the_operators() -> None:
    """Else `native.set_isa` would not reach the operators, and the tests below would compare a path with itself."""
    native.isa()
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libhvd_syncbn.so" in line}
    assert len(files) == 1


def results(shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Any]:
    """A step with everything in it, and one with nothing."""
    tensors = large(dtype) if shape is None else tuple(randn(seed, *shape, dtype=dtype) for seed in range(3))
    x, dy, residual = (in_layout(tensor, layout) for tensor in tensors)
    full = randomize(SyncBatchNorm(x.shape[1], activation="relu"))
    return [step(full, x, dy, residual), step(SyncBatchNorm(x.shape[1], affine=False, track_running_stats=False), x, dy)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_paths_threads_and_layouts_give_the_same_bytes(dtype: torch.dtype) -> None:
    with threads(1), isa("baseline"):
        want = results(dtype=dtype)
    for path in native.isas():
        for number in (1, 2):
            for layout in LAYOUTS:
                with threads(number), isa(path):
                    assert_same(results(dtype=dtype, layout=layout), want, f"{path}, {number} threads, {layout}:")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts_give_the_same_bytes(shape: tuple[int, ...]) -> None:
    assert_same(results(shape, layout="channels_last"), results(shape))


def test_stack_has_one_digest() -> None:
    """What tests/parallel continues over ranks and splits."""
    digests = set()
    for path in native.isas():
        for layout in LAYOUTS:
            with isa(path):
                y, dx, running = torch_stack(list(range(vectors.SAMPLES)), layout)
            digests.add(vectors.digest(y, dx, running))
    assert len(digests) == 1


def test_flush_to_zero_changes_nothing() -> None:
    """Denormals in, denormals through, denormals out, whatever the caller's threads do with theirs."""
    shape = (16, 32, 20, 20)  # two threads' worth
    x, dy, residual = (randn(seed, *shape) * 1e-42 for seed in range(3))
    # The output is x * 316, and x, dy and dx alike are below the least normal number, 1.2e-38.
    for number in (1, 2):
        with threads(number):
            for layout in LAYOUTS:
                inputs = [in_layout(tensor, layout) for tensor in (x, dy, residual)]
                want = step(SyncBatchNorm(32, activation="relu"), *inputs)
                assert 0 < want["y"].max() < 1e-38 and 0 < want["dx"].abs().max() < 1e-38
                assert 0 < want["running_mean"].abs().max() < 1e-38
                try:
                    if not torch.set_flush_denormal(True):
                        pytest.skip("this machine cannot flush denormals")
                    assert (x[0, 0, 0] * 1.0).count_nonzero() == 0  # in this thread; PyTorch leaves its workers alone
                    got = step(SyncBatchNorm(32, activation="relu"), *inputs)
                finally:
                    torch.set_flush_denormal(False)
                assert_same(got, want)


# --- Inputs as they lie in memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (6, 5, 1, 1), (6, 1, 4, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_lies_as_the_input(shape: tuple[int, ...], layout: str) -> None:
    x, residual = in_layout(randn(1, *shape), layout), randn(2, *shape)
    x.requires_grad_()
    y = SyncBatchNorm(shape[1], activation="relu")(x, residual)
    y.backward(randn(3, *shape))
    assert x.grad is not None
    assert y.stride() == x.stride() == x.grad.stride()


def test_channels_last_as_torch_spells_it() -> None:
    for x, memory_format in (
        (randn(1, 4, 5, 6, 7), torch.channels_last),
        (randn(1, 3, 5, 4, 3, 6), torch.channels_last_3d),
    ):
        y = SyncBatchNorm(5)(x.to(memory_format=memory_format))
        assert y.is_contiguous(memory_format=memory_format)
        assert_same(y, SyncBatchNorm(5)(x))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2],
        lambda x: x[:, 1::2],
        lambda x: x[..., 1:],
        lambda x: x[:, :, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x.transpose(0, 1),
        lambda x: x.flip(0).permute(0, 3, 1, 2),
        lambda x: x[:1].expand(6, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
        lambda x: in_layout(x, "channels_last")[:, ::2],
        lambda x: in_layout(x, "channels_last")[:, :, 1:, ::2],
        lambda x: torch.as_strided(x, (2, 3, 4, 4), (8, 4, 2, 1)),
    ],
)
def test_strided_inputs(view: Any) -> None:
    """Of x, dy and residual."""
    x, dy, residual = (view(randn(seed, 6, 5, 8, 9)) for seed in range(3))
    layer = randomize(SyncBatchNorm(x.shape[1], activation="relu"))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    got = step(layer, x, dy, residual)
    layer.load_state_dict(state)
    assert_same(got, step(layer, *(tensor.clone(memory_format=torch.contiguous_format) for tensor in (x, dy, residual))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_tensors_in_another_layout(layout: str) -> None:
    """A compiler may keep what backward reads as it likes."""
    x, dy, y = (randn(seed, 4, 5, 6, 7) for seed in range(3))
    stats = torch.ones(2, 5, dtype=torch.float64)

    def backward(x: Tensor, dy: Tensor, y: Tensor) -> list[Tensor]:
        packet, *parameters = ops.backward_moments(x, dy, y, stats, torch.float32)
        return [packet, *parameters, *ops.backward_apply(x, dy, y, packet, stats, None, True, "name")]

    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    assert_same(backward(in_layout(x, layout), in_layout(dy, other), in_layout(y, other)), backward(x, dy, y))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_stride_gradient(layout: str) -> None:
    x = in_layout(randn(1, 4, 5, 6, 7), layout)
    results = []
    for ones in (lambda y: y.sum().backward(), lambda y: y.backward(torch.ones(4, 5, 6, 7))):
        layer, leaf = randomize(SyncBatchNorm(5, activation="relu")), x.clone().requires_grad_()
        ones(layer(leaf))
        results.append([leaf.grad, *(p.grad for p in layer.parameters())])
    assert_same(*results)
