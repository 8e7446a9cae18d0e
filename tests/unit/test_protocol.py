"""What the protocol promises, proven on the core without a framework (docs/protocol.md, 2, 5 and 6.2)."""

from __future__ import annotations

import ctypes
import decimal
import itertools
import threading
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hvd_syncbn import native, protocol
from tests.arrays import hostile, logical, rounded, same_bits, storage

EPS = 1e-5


def step(
    x: NDArray[Any], dy: NDArray[Any], dtype: str, parts: list[tuple[list[int], str, int]]
) -> tuple[list[NDArray[Any]], list[NDArray[Any]], NDArray[Any], NDArray[Any]]:
    """One training step of ranks that hold `parts`: (samples, layout, splits). `(y, dx)` per part, running statistics."""
    channels, positions = x.shape[1:]
    gamma, beta = (np.random.default_rng(5).standard_normal((2, channels))).astype(np.float32)
    shapes = [native.shape(len(p[0]), channels, positions, dtype, p[1]) for p in parts]
    xs = [storage(x[p[0]], dtype, p[1]) for p in parts]
    dys = [storage(dy[p[0]], dtype, p[1]) for p in parts]
    splits = [p[2] for p in parts]
    total = sum(native.forward_packet(*args, EPS, splits=k) for *args, k in zip(shapes, xs, splits, strict=True))
    running = [np.zeros(channels, np.float32), np.ones(channels, np.float32)]
    ys = []
    for shape, part, k in zip(shapes, xs, splits, strict=True):
        local = [np.zeros(channels, np.float32), np.ones(channels, np.float32)]
        y, stats = native.forward(shape, part, total, EPS, gamma, beta, *local, relu=True, splits=k)
        ys.append(y)
        running = local
    total = sum(
        native.backward_packet(*args, stats, y=y, splits=k) for *args, y, k in zip(shapes, xs, dys, ys, splits, strict=True)
    )
    dxs = [
        native.backward(shape, part, g, total, stats, gamma, y=y, splits=k)[0]
        for shape, part, g, y, k in zip(shapes, xs, dys, ys, splits, strict=True)
    ]
    return ys, dxs, running[0], running[1]


@settings(max_examples=80, deadline=None)
@given(
    st.data(),
    st.integers(1, 24),
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from(protocol.DTYPES),
    st.integers(0, 2**32),
)
def test_any_partition_permutation_and_world_size(
    data: st.DataObject, samples: int, channels: int, positions: int, dtype: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = hostile(rng, (samples, channels, positions), dtype, nonfinite=bool(seed % 2))
    dy = hostile(rng, (samples, channels, positions), dtype, nonfinite=False)
    whole = step(x, dy, dtype, [(list(range(samples)), "channels_first", 1)])

    ranks = data.draw(st.integers(1, 40))  # most of them empty where there are more ranks than samples
    owner = data.draw(st.lists(st.integers(0, ranks - 1), min_size=samples, max_size=samples))
    order = rng.permutation(samples)
    parts = []
    for rank in range(ranks):
        mine = [int(i) for i in order if owner[i] == rank]
        parts.append((mine, str(rng.choice(native.LAYOUTS)), int(rng.integers(1, 4))))
    ys, dxs, *running = step(x, dy, dtype, parts)
    assert same_bits(running[0], whole[2]) and same_bits(running[1], whole[3])
    for (mine, layout, _), y, dx in zip(parts, ys, dxs, strict=True):
        for got, want in ((y, whole[0][0]), (dx, whole[1][0])):
            got = got.transpose(0, 2, 1) if layout == "channels_last" else got
            assert same_bits(got, want[mine])


def test_threads_may_add_to_one_packet() -> None:
    x = np.random.default_rng(0).standard_normal((64, 33, 50)).astype(np.float32)
    shape = native.shape(64, 33, 50, "float32")
    want = native.forward_packet(shape, x, EPS)
    lib = native.library()
    units = lib.hvd_syncbn_moments_units(ctypes.byref(shape))
    for _ in range(20):
        packet = np.zeros_like(want)
        start = threading.Barrier(4)

        def add(part: int, packet: NDArray[np.int64] = packet, start: threading.Barrier = start) -> None:
            start.wait()
            lib.hvd_syncbn_forward_moments(
                ctypes.byref(shape),
                ctypes.c_void_p(x.ctypes.data),
                None,
                ctypes.c_int64(units * part // 4),
                ctypes.c_int64(units * (part + 1) // 4),
                ctypes.c_void_p(packet.ctypes.data),
            )

        threads = [threading.Thread(target=add, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        count = ctypes.c_int64(64 * 50)
        lib.hvd_syncbn_forward_close(
            ctypes.byref(shape), ctypes.c_double(EPS), ctypes.c_int32(0), count, ctypes.c_void_p(packet.ctypes.data)
        )
        assert same_bits(packet, want)


@pytest.mark.parametrize("value", [0.1, -3.0, 2.0**38, -(2.0**-60), 2.0**-149])
@pytest.mark.parametrize("alternating", [False, True])
def test_millions_of_pieces_carry(value: float, alternating: bool) -> None:
    """Past every count at which carries are propagated: 2^22 values and more, one piece each."""
    n = 5_000_001
    x = np.full((n, 1, 1), value, np.float32)
    if alternating:
        x[::2] *= -1
        x[::3] *= np.float32(2.0**40)  # far from its neighbors: leaves the window of the fast path every time
    packet = native.forward_packet(native.shape(n, 1, 1, "float32"), x, EPS)
    values, counts = np.unique(x, return_counts=True)
    for moment, power in ((5, 1), (13, 2)):
        exact = 0
        for v, count in zip(values.tolist(), counts.tolist(), strict=True):
            fixed = protocol.to_fixed(v**power)
            assert fixed is not None
            exact += fixed * count
        assert packet[moment : moment + 8].tolist() == protocol.to_limbs(exact)


def test_ranks_that_disagree_are_found() -> None:
    channels = 3
    x = np.ones((2, channels, 4), np.float32)
    mine = native.shape(2, channels, 4, "float32")
    packet = native.forward_packet(mine, x, EPS)
    assert native.check_packet(native.FORWARD, packet) == native.OK
    assert native.check_packet(native.FORWARD, packet * 512) == native.OK
    half = native.forward_packet(native.shape(2, channels, 4, "float16"), x.astype(np.float16).view(np.uint16), EPS)
    other_eps = native.forward_packet(mine, x, 1e-3)
    differentiated = native.forward_packet(mine, x, EPS, call=native.call_number("layer", True))
    assert native.check_packet(native.FORWARD, differentiated * 3) == native.OK
    for others in (
        [half],
        [other_eps],
        [differentiated],
        [other_eps, half],
        [packet, packet, other_eps],
        [packet] * 9 + [half],
    ):
        total = sum(others, start=packet.copy())
        assert native.check_packet(native.FORWARD, total) == native.RANKS_DISAGREE
    empty = native.forward_packet(native.shape(0, channels, 4, "float32"), x[:0], EPS)
    assert native.check_packet(native.FORWARD, empty + empty) == native.EMPTY
    one = native.forward_packet(native.shape(1, channels, 1, "float32"), x[:1, :, :1].copy(), EPS)
    assert native.check_packet(native.FORWARD, one + empty) == native.ONE_VALUE
    # A rank that has joined contributes zeros, and is no participant.
    assert native.check_packet(native.FORWARD, packet + np.zeros_like(packet)) == native.OK


def test_squares_tell_what_the_sum_does_not() -> None:
    """Digests d - 1, d, d + 1 have the sum of three d."""
    packet = native.forward_packet(native.shape(1, 1, 2, "float32"), np.ones((1, 1, 2), np.float32), EPS)
    d = int(packet[2])
    total = packet * 3
    assert native.check_packet(native.FORWARD, total) == native.OK
    total[3] = protocol._wrap((d - 1) ** 2 + d**2 + (d + 1) ** 2)
    assert native.check_packet(native.FORWARD, total) == native.RANKS_DISAGREE


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=600), st.booleans())
def test_the_header_alone_tells(digests: list[int], equal: bool) -> None:
    """Whatever a rank's own digest is; the C++ equals the reference."""
    digests = digests[:1] * len(digests) if equal else digests
    packets = [protocol.empty_packet(0, digest) for digest in digests]
    total = sum(packets[1:], start=packets[0])
    total.count = 2
    assert total.agreed() == (len(set(digests)) == 1)
    words = np.array(total.words(), np.int64)
    assert native.check_packet(native.FORWARD, words) == (native.OK if total.agreed() else native.RANKS_DISAGREE)


def test_two_halves_of_512_ranks_that_disagree_are_found() -> None:
    """256 * 256 * difference^2, modulo 2^64, for each two digests that differ by what one argument changes."""
    digests = {
        protocol.forward_digest(eps, dtype, channels, call)
        for eps, dtype, channels, call in itertools.product((1e-5, 1e-3, 1e-6, 0.0), protocol.DTYPES, range(1, 40), (0, 1))
    }
    assert len(digests) == 4 * 4 * 39 * 2
    differences = {abs(a - b) for a, b in itertools.combinations(digests, 2)}
    assert not [d for d in differences if 2**16 * d**2 % 2**64 == 0]


def test_backward_packets_of_different_calls_are_told_apart() -> None:
    """A call is known by its statistics, whichever bit of them differs."""
    rng = np.random.default_rng(0)
    shape = native.shape(2, 5, 4, "float32")
    x, dy = rng.standard_normal((2, 2, 5, 4)).astype(np.float32)
    stats = rng.standard_normal((2, 5))
    packet = native.backward_packet(shape, x, dy, stats)
    assert native.check_packet(native.BACKWARD, packet + native.backward_packet(shape, -x, x, stats)) == native.OK
    others = [stats[:, ::-1].copy(), stats[::-1].copy(), np.stack([stats[0], stats[1, ::-1]]), np.zeros((2, 5)), -stats]
    for i, bit in itertools.product(range(10), range(64)):
        other = stats.copy()
        other.reshape(-1).view(np.int64)[i] ^= np.int64(-(2**63)) if bit == 63 else np.int64(1 << bit)
        others.append(other)
    for other in others:
        total = packet + native.backward_packet(shape, x, dy, other)
        assert native.check_packet(native.BACKWARD, total) == native.CALLS_DIFFER
    empty = native.backward_packet(native.shape(0, 5, 4, "float32"), x[:0], dy[:0], stats)
    assert native.check_packet(native.BACKWARD, packet + empty) == native.OK
    # Of coarse values, whose low bits are 0.
    coarse = itertools.product((0.0, 0.5, -0.5, 1.0, 2.0), repeat=4)
    digests = {
        int(native.backward_packet(native.shape(0, 2, 1, "float32"), x[:0, :2], x[:0, :2], np.array(s).reshape(2, 2))[2])
        for s in coarse
    }
    assert len(digests) == 5**4
    # Of the same values in another order, in the other channels or in the other statistic.
    values = (1.0, 2.0, 0.5, 4.0, 0.25, 8.0)
    for pairs in (list(itertools.permutations(values)), list(itertools.product(values[:2], repeat=6))):
        for calls in ([zip(p, values, strict=True) for p in pairs], [zip(values, p, strict=True) for p in pairs]):
            found = {protocol.backward_digest([protocol.Statistics(m, 0, i) for m, i in call]) for call in calls}
            assert len(found) == len(pairs)


def _rational(values: NDArray[np.float32]) -> tuple[Fraction, Fraction, Decimal]:
    """Exact mean and variance of float32 values, and 1 / sqrt(var + eps) to 60 digits."""
    exact = [Fraction(float(v)) for v in values]
    mean = sum(exact, Fraction(0)) / len(exact)
    var = sum((v * v for v in exact), Fraction(0)) / len(exact) - mean * mean
    with decimal.localcontext() as context:
        context.prec = 60
        total = var + Fraction(EPS)
        return mean, var, 1 / (Decimal(total.numerator) / Decimal(total.denominator)).sqrt()


def _ulps(got: NDArray[Any], exact: list[Fraction], unit_of: list[float]) -> float:
    """The largest distance, each in float32 units in the last place of `unit_of`."""
    units = np.spacing(np.array(unit_of, np.float32)).astype(float)
    return max(float(abs(Fraction(float(g)) - e)) / u for g, e, u in zip(got.reshape(-1), exact, units, strict=True))


@pytest.mark.parametrize(("layout", "with_residual"), [("channels_first", True), ("channels_last", False)])
@pytest.mark.parametrize(
    ("ratio", "of_invstd", "of_y"), [(0.0, 1e-12, 1.0), (1.0, 1e-12, 1.0), (1e2, 1e-12, 1.0), (1e4, 1e-8, 1.2), (1e6, 1e-4, 0)]
)
@pytest.mark.parametrize("sizes", [(8, 1, 300), (2, 1, 2100), (300, 2, 1), (4, 8, 4)], ids=str)
def test_accuracy(
    sizes: tuple[int, int, int], ratio: float, of_invstd: float, of_y: float, with_residual: bool, layout: str
) -> None:
    """The promises of section 5, against exact rationals."""
    n, c, s = sizes
    rng = np.random.default_rng(int(ratio) + n)
    x = (rng.standard_normal(sizes) + ratio).astype(np.float32)
    dy, residual = rng.standard_normal((2, *sizes)).astype(np.float32)
    gamma, beta = rng.uniform(0.5, 1.5, c).astype(np.float32), rng.standard_normal(c).astype(np.float32)
    shape = native.shape(n, c, s, "float32", layout)
    stored, stored_dy, stored_residual = (storage(array.astype(np.float64), "float32", layout) for array in (x, dy, residual))
    packet = native.forward_packet(shape, stored, EPS)
    y, stats = native.forward(shape, stored, packet, EPS, gamma, beta, residual=stored_residual if with_residual else None)
    packet = native.backward_packet(shape, stored, stored_dy, stats)
    dx, _ = native.backward(shape, stored, stored_dy, packet, stats, gamma)
    y, dx = (logical(array, "float32", layout) for array in (y, dx))
    for channel in range(c):
        values, gradients, added = ([Fraction(float(v)) for v in array[:, channel].reshape(-1)] for array in (x, dy, residual))
        mean, var, root = _rational(x[:, channel].reshape(-1))
        assert abs(Fraction(float(stats[0, channel])) - mean) <= Fraction(1e-14) * max(abs(mean), Fraction(np.sqrt(float(var))))
        assert abs(Decimal(float(stats[1, channel])) - root) <= Decimal(of_invstd) * root
        if ratio > 1e4:
            continue
        invstd, scale = Fraction(root), Fraction(root) * Fraction(float(gamma[channel]))
        exact = [(v - mean) * scale + Fraction(float(beta[channel])) for v in values]
        if with_residual:
            exact = [e + r for e, r in zip(exact, added, strict=True)]
        assert _ulps(y[:, channel], exact, [max(abs(float(e)), 1.0) for e in exact]) <= of_y
        dy_mean = sum(gradients, Fraction(0)) / len(gradients)
        dyd_mean = sum((g * (v - mean) for g, v in zip(gradients, values, strict=True)), Fraction(0)) / len(gradients)
        slope = dyd_mean * invstd * invstd
        exact = [scale * (g - dy_mean - slope * (v - mean)) for g, v in zip(gradients, values, strict=True)]
        assert _ulps(dx[:, channel], exact, [max(abs(float(e)) for e in exact)] * len(exact)) <= 1.25


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1e3, 1.6e9, -1e20])
def test_channel_of_one_value_gives_beta(value: float, dtype: str) -> None:
    """However large: what a mean of 1e22 standard deviations costs is not taken from beta."""
    shape = native.shape(6, 2, 9, dtype)
    x = storage(np.full((6, 2, 9), value), dtype)
    beta = np.array([0.3, -7.0], np.float32)
    y, _ = native.forward(shape, x, native.forward_packet(shape, x, EPS), EPS, np.array([0.7, 1.3], np.float32), beta)
    assert (y == beta[:, None]).all()


def test_gradient_of_large_values() -> None:
    """Values of 2^50 and small gradients: the same digits as values of 1, for all scaling is by powers of two."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 8, 1, 33)).astype(np.float32)
    shape = native.shape(8, 1, 33, "float32")
    results = []
    for power in (0, 50):
        scaled, gradient = x * np.float32(2.0**power), dy * np.float32(2.0**-power)
        _, stats = native.forward(shape, scaled, native.forward_packet(shape, scaled, 0.0), 0.0)
        packet = native.backward_packet(shape, scaled, gradient, stats)
        results.append(native.backward(shape, scaled, gradient, packet, stats)[0])
    assert np.abs(results[0]).max() > 1
    assert same_bits(results[1] * np.float32(2.0**100), results[0])


def test_paths_of_other_machines_are_refused() -> None:
    with pytest.raises(ValueError, match="Received: 'mmx'"):
        native.set_isa("mmx")


@pytest.mark.parametrize("dtype", protocol.DTYPES)
def test_rounding_of_the_reference(dtype: str) -> None:
    """The reference's own rounding against numpy's (and ml_dtypes'), ties, subnormals and overflow included."""
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [hostile(rng, (4000,), "float64", False), rng.standard_normal(4000) * 2.0 ** rng.integers(-160, 130, 4000)]
    )
    if dtype == "bfloat16":  # ml_dtypes rounds float64 twice, through float32
        values = rounded(values, "float32")
    want = rounded(values, dtype)
    got = np.array([protocol.round_to(v, dtype) for v in values.tolist()])
    assert same_bits(got, want)
