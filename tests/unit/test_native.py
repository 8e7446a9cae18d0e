"""The C++ core equals the pure-Python reference bit for bit, on every instruction-set path (docs/protocol.md, 6.1 and 6.3)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hvd_syncbn import native, protocol
from tests.arrays import hostile, logical, rounded, same_bits, storage

# Sample counts, channels (vector widths and tails, more than one tile), positions (lanes and pieces, one off each way).
SHAPES = [
    (2, 3, 1),
    (1, 1, 1),
    (3, 17, 2),
    (2, 5, 31),
    (1, 33, 32),
    (2, 16, 33),
    (2, 9, 49),
    (3, 5, 63),
    (1, 6, 64),
    (1, 2, 1023),
    (1, 1, protocol.PIECE - 1),
    (1, 2, protocol.PIECE),
    (1, 1, protocol.PIECE + 1),
    (2, 70, 5),
    (1, 130, 3),
    (0, 4, 7),
    (2, 0, 7),
    (2, 3, 0),
]


@pytest.fixture(params=native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def usual(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, outliers: bool) -> NDArray[np.float64]:
    """What networks see: values of one scale, zeros, and perhaps, rarely, something far from all others."""
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12) + rng.integers(-2, 3)
    values = np.where(rng.random(shape) < 0.2, 0.0, values)
    if outliers:
        values = np.where(rng.random(shape) < 0.01, values * 2.0 ** rng.integers(-60, 60, shape), values)
    return rounded(values, dtype)


def check(
    n: int,
    c: int,
    s: int,
    dtype: str,
    layout: str,
    seed: int,
    relu: bool,
    masked: bool,
    splits: int,
    data: str = "hostile",
) -> None:
    """One training step, both ways."""
    rng = np.random.default_rng(seed)
    eps = 1e-5
    if data == "hostile":
        x = hostile(rng, (n, c, s), dtype, nonfinite=bool(seed % 3 == 0))
        dy = hostile(rng, (n, c, s), dtype, nonfinite=bool(seed % 5 == 0))
    else:
        x, dy = (usual(rng, (n, c, s), dtype, data == "outliers") for _ in range(2))
    residual = hostile(rng, (n, c, s), dtype, nonfinite=False)
    mask = rng.random((n, s)) < 0.7 if masked else None
    param_type = "float64" if dtype == "float64" else "float32"
    gamma, beta = (rounded(rng.standard_normal(c), param_type) for _ in range(2))
    mean0, var0 = (rounded(rng.standard_normal(c), "float32") for _ in range(2))
    shape = native.shape(n, c, s, dtype, layout)
    xs, rs, dys = (storage(v, dtype, layout) for v in (x, residual, dy))
    ms = None if mask is None else mask.astype(np.uint8)
    gs, bs = (v.astype(param_type) for v in (gamma, beta))

    name, needs_gradient = f"layer {seed}", bool(seed % 2)
    call = native.call_number(name, needs_gradient)
    assert call == protocol.call_number(name, needs_gradient)
    packet = native.forward_packet(shape, xs, eps, ms, splits, call=call)
    expected = protocol.forward_packet(x, eps, dtype, mask, call=call)
    assert packet.tolist() == expected.words()
    assert expected.agreed()

    statistics = protocol.finish_forward(expected, eps)
    mean, var, skip = mean0.astype(np.float32), var0.astype(np.float32), bool(seed % 2)
    y, stats = native.forward(shape, xs, packet, eps, gs, bs, mean, var, (0.9, 0.1), True, rs, relu, splits, skip)
    assert same_bits(stats, np.array([[t.mean for t in statistics], [t.invstd for t in statistics]]).reshape(2, c))
    y_expected = protocol.apply_forward(x, statistics, dtype, gamma, beta, residual, relu)
    assert same_bits(y, storage(y_expected, dtype, layout))
    if expected.count > 1:
        for got, old, batch in (
            (mean, mean0, [t.mean for t in statistics]),
            (var, var0, [protocol.unbiased(t.var, expected.count) for t in statistics]),
        ):
            want = [protocol.running(float(o), b, 0.9, 0.1, skip_nonfinite=skip) for o, b in zip(old, batch, strict=True)]
            assert same_bits(got, np.array(want, np.float32).reshape(c))

    ys, y_reference = (y, logical(y, dtype, layout)) if relu else (None, None)
    packet = native.backward_packet(shape, xs, dys, stats, ys, expected.count, splits)
    expected = protocol.backward_packet(x, dy, statistics, y_reference, expected.count)
    assert packet.tolist() == expected.words()
    for narrow in ("float32", "float16", "bfloat16", "float64"):
        gradients = native.parameter_gradients(shape, packet, stats, narrow)
        want_gradients = np.array(protocol.parameter_gradients(expected, statistics, narrow)).reshape(c, 2)
        for got, column in zip(gradients, want_gradients.T, strict=True):
            assert same_bits(got, storage(column.reshape(1, c, 1), narrow).reshape(c))
    dx, dresidual = native.backward(shape, xs, dys, packet, stats, gs, ys, ms, splits)
    dx_expected, dresidual_expected = protocol.apply_backward(x, dy, expected, statistics, dtype, gamma, y_reference, mask)
    assert same_bits(dx, storage(dx_expected, dtype, layout))
    assert same_bits(dresidual, storage(dresidual_expected, dtype, layout))


@pytest.mark.parametrize("layout", native.LAYOUTS)
@pytest.mark.parametrize("dtype", protocol.DTYPES)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_step_equals_reference(isa: str, sizes: tuple[int, int, int], dtype: str, layout: str) -> None:
    seed = sum(sizes) + protocol.DTYPES.index(dtype)
    check(*sizes, dtype, layout, seed, relu=bool(seed % 2), masked=seed % 4 == 1, splits=1 + seed % 3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("c", "s"), [(2100, 129), (2100, 300), (600, 1300), (37, 3000)])
def test_layouts_have_equal_packets(isa: str, c: int, s: int, masked: bool) -> None:
    """Channels last of more than one tile and pieces of several blocks of rows (kRows in csrc/cpu/moments.h), which take
    the reference minutes; channels first is held to it above."""
    rng = np.random.default_rng(c + s)
    x, dy = (usual(rng, (2, c, s), "float32", outliers=True) for _ in range(2))
    mask = (rng.random((2, s)) < 0.7).astype(np.uint8) if masked else None
    forward, backward = [], []
    for layout in native.LAYOUTS:
        shape = native.shape(2, c, s, "float32", layout)
        xs, dys = storage(x, "float32", layout), storage(dy, "float32", layout)
        packet = native.forward_packet(shape, xs, 1e-5, mask, splits=3)
        y, stats = native.forward(shape, xs, packet, 1e-5, relu=True)
        forward.append(packet)
        backward.append(native.backward_packet(shape, xs, dys, stats, y))
    assert same_bits(*forward)
    assert same_bits(*backward)


@pytest.mark.parametrize(("splits", "masked"), [(1, False), (3, True)])
def test_rows_of_many_pieces_equal_reference(isa: str, splits: int, masked: bool) -> None:
    """More than are read one after the other (kRun in csrc/cpu/moments.h); the parts of 3 begin and end within a row."""
    check(1, 1, 17 * protocol.PIECE + 3, "float32", "channels_first", 1, True, masked, splits)


@settings(max_examples=60, deadline=None)
@example(1, 42, 2, "float32", "channels_first", 445, False, True, 1, "baseline")  # a NaN of the processor's own sign
@given(
    n=st.integers(0, 4),
    c=st.integers(1, 80),
    s=st.integers(1, 70),
    dtype=st.sampled_from(protocol.DTYPES),
    layout=st.sampled_from(native.LAYOUTS),
    seed=st.integers(0, 2**32),
    relu=st.booleans(),
    masked=st.booleans(),
    splits=st.integers(1, 7),
    path=st.sampled_from(native.isas()),
)
def test_any_step_equals_reference(
    n: int, c: int, s: int, dtype: str, layout: str, seed: int, relu: bool, masked: bool, splits: int, path: str
) -> None:
    before = native.isa()
    native.set_isa(path)
    try:
        check(n, min(c, 1 + 3000 // (n * s + 1)), s, dtype, layout, seed, relu, masked, splits)
    finally:
        native.set_isa(before)


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(8, 40),
    c=st.integers(1, 40),
    s=st.sampled_from([1, 1, 3, 49]),
    dtype=st.sampled_from(protocol.DTYPES),
    layout=st.sampled_from(native.LAYOUTS),
    seed=st.integers(0, 2**32),
    relu=st.booleans(),
    masked=st.booleans(),
    splits=st.integers(1, 3),
    data=st.sampled_from(["usual", "outliers", "hostile"]),
    path=st.sampled_from(native.isas()),
)
@pytest.mark.slow
def test_many_samples_equal_reference(
    n: int,
    c: int,
    s: int,
    dtype: str,
    layout: str,
    seed: int,
    relu: bool,
    masked: bool,
    splits: int,
    data: str,
    path: str,
) -> None:
    """Enough samples for the bins of the exact sums (csrc/cpu/tile_sums.h): pieces of one element go in groups of samples."""
    before = native.isa()
    native.set_isa(path)
    try:
        check(n, c, s, dtype, layout, seed, relu, masked, splits, data)
    finally:
        native.set_isa(before)


@cache
def full_bins(scale: int, sign: tuple[float, float]) -> tuple[NDArray[np.float64], NDArray[np.float64], list[int], list[int]]:
    """Input, statistics, and the words of both packets by the reference, which is the same for every instruction set."""
    n, c = 4096 + 77, 9
    largest = np.float32(2 - 2**-23) * np.float32(2.0) ** scale
    x = np.empty((n, c, 1))
    x[0::2], x[1::2] = sign[0] * largest, sign[1] * largest
    x[:8] /= 8  # the bins are placed for the first samples
    x[::97] *= 2.0**-12
    packet = protocol.forward_packet(x, 1e-5, "float32")
    statistics = protocol.finish_forward(packet, 1e-5)
    stats = np.array([[t.mean for t in statistics], [t.invstd for t in statistics]])
    return x, stats, packet.words(), protocol.backward_packet(x, x, statistics, None, n).words()


@pytest.mark.parametrize("sign", [(1.0, 1.0), (1.0, -1.0)], ids=["same sign", "alternating"])
@pytest.mark.parametrize("scale", [0, -20, 30])
def test_full_bins(isa: str, scale: int, sign: tuple[float, float]) -> None:
    """More samples of the largest and finest values than a bin of the exact sums holds."""
    x, stats, forward, backward = full_bins(scale, sign)
    n, c, _ = x.shape
    shape = native.shape(n, c, 1, "float32", "channels_first")
    assert native.forward_packet(shape, storage(x, "float32"), 1e-5).tolist() == forward
    words = native.backward_packet(shape, storage(x, "float32"), storage(x, "float32"), stats, None, n).tolist()
    assert words == backward
