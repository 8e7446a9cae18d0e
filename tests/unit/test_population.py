"""Statistics of a data set: the C++ core equals the reference, and both equal plain definitions (docs/protocol.md, 9)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hvd_syncbn import native, population, protocol
from tests.arrays import NUMPY, hostile, rounded, same_bits, storage
from tests.recalibration import total

EPS = 1e-5


def batches(seed: int, dtype: str = "float32", nonfinite: bool = False) -> list[NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    return [hostile(rng, (n, 7, s), dtype, nonfinite) for n, s in ((3, 4), (1, 9), (0, 4), (5, 1), (2, 2))]


def packets(parts: list[NDArray[np.float64]], dtype: str) -> list[NDArray[np.int64]]:
    return [native.forward_packet(native.shape(*x.shape, dtype), storage(x, dtype), EPS) for x in parts]


def empty(channels: int) -> NDArray[np.int64]:
    return np.zeros(native.packet_size(channels), np.int64)


def finished(
    words: NDArray[np.int64], estimator: int, unbiased: bool, dtype: str, parameters: str, channels: int = 7
) -> list[NDArray[Any]]:
    vectors = [np.full(channels, 9, NUMPY[d]) for d in (dtype, dtype, parameters, parameters)]
    stored = [
        (v.view(np.uint16) if v.itemsize == 2 else v, d)
        for v, d in zip(vectors, (dtype, dtype, parameters, parameters), strict=True)
    ]
    assert native.population(words, estimator, unbiased, EPS, *stored) == native.OK
    return vectors


def expected(stats: list[tuple[float, float]], dtype: str, parameters: str) -> list[NDArray[Any]]:
    mean, variance = ([protocol.round_to(s[i], dtype) for s in stats] for i in (0, 1))
    gamma = [protocol.identity_gamma(v, EPS, parameters) for v in variance]
    beta = [protocol.round_to(m, parameters) for m in mean]
    vectors = zip((mean, variance, gamma, beta), (dtype, dtype, parameters, parameters), strict=True)
    return [np.array(vector).astype(NUMPY[d]) for vector, d in vectors]


@pytest.mark.parametrize("nonfinite", [False, True])
@pytest.mark.parametrize("dtype", protocol.DTYPES)
def test_pooled_equals_reference(dtype: str, nonfinite: bool) -> None:
    parts = batches(3, dtype, nonfinite)
    words = empty(7)
    for packet in packets(parts, dtype):
        native.add_packet(packet, words)
    want = total([protocol.forward_packet(x, EPS, dtype) for x in parts])
    assert words[0] == 0 and words[1] == want.count and words[4:].tolist() == want.words()[4:]
    for unbiased in (False, True):
        for stored, parameters in (("float32", "float32"), ("bfloat16", "float16"), ("float64", "float32")):
            got = finished(words, native.POOLED, unbiased, stored, parameters)
            for a, b in zip(got, expected(protocol.pooled_population(want, unbiased), stored, parameters), strict=True):
                assert same_bits(a, b)


@pytest.mark.parametrize("nonfinite", [False, True])
@pytest.mark.parametrize("dtype", protocol.DTYPES)
def test_batches_equal_reference_in_any_order(dtype: str, nonfinite: bool) -> None:
    parts = batches(4, dtype, nonfinite)
    made = packets(parts, dtype)
    want = protocol.Packet(0, 0, (0, 0), [0] * 7, [0] * 7, [0] * 7)
    for x in parts:
        want = protocol.add_batch(want, protocol.forward_packet(x, EPS, dtype))
    for order in (made, made[::-1]):
        words = empty(7)
        status = [native.add_batch(packet, words) for packet in order]
        assert sorted(status) == [native.OK] * 4 + [native.EMPTY]
        assert words[1] == want.count == 4 and words[4:].tolist() == want.words()[4:]
        got = finished(words, native.BATCHES, False, "float32", "float32")
        for a, b in zip(got, expected(protocol.batches_population(want), "float32", "float32"), strict=True):
            assert same_bits(a, b)


def test_both_estimators_by_their_definitions() -> None:
    """In exact rationals: mean and n/(n-1) variance of everything; the paper's means of means and of m/(m-1) variances."""
    parts = [x.reshape(-1) for x in np.split(np.random.default_rng(0).standard_normal((12, 1, 4)).astype(np.float32), 3)]
    exact = [[Fraction(float(v)) for v in part] for part in parts]

    def moments(numbers: list[Fraction]) -> tuple[Fraction, Fraction]:
        mean = sum(numbers, Fraction(0)) / len(numbers)
        return mean, sum(((v - mean) ** 2 for v in numbers), Fraction(0)) / len(numbers)

    everything = [v for part in exact for v in part]
    n, m = len(everything), len(exact[0])
    mean, variance = moments(everything)
    pooled = mean, variance * Fraction(n, n - 1)
    of_batches = [moments(part) for part in exact]
    paper = sum(b[0] for b in of_batches) / 3, Fraction(m, m - 1) * sum(b[1] for b in of_batches) / 3
    made = packets([part.reshape(4, 1, 4).astype(np.float64) for part in parts], "float32")
    for estimator, want in ((native.POOLED, pooled), (native.BATCHES, paper)):
        words = empty(1)
        for packet in made:
            (native.add_packet if estimator == native.POOLED else native.add_batch)(packet, words)
        got = finished(words, estimator, True, "float32", "float32", 1)
        assert [float(got[0][0]), float(got[1][0])] == [np.float32(float(w)) for w in want]


def test_what_has_no_variance_is_refused_and_changes_nothing() -> None:
    one = packets([np.ones((1, 2, 1))], "float32")[0]
    words = empty(2)
    vectors = [(np.full(2, 9, np.float32), "float32") for _ in range(4)]
    assert native.population(words, native.POOLED, True, EPS, *vectors) == native.EMPTY
    assert native.add_batch(one, words) == native.ONE_VALUE and not words.any()
    native.add_packet(one, words)
    for unbiased in (False, True):
        assert native.population(words, native.POOLED, unbiased, EPS, *vectors) == native.ONE_VALUE
    assert all((array == 9).all() for array, _ in vectors)
    with pytest.raises(ValueError, match="Received: 1"):
        protocol.add_batch(total([protocol.empty_packet(2)]), protocol.forward_packet(np.ones((1, 2, 1)), EPS, "float32"))


def test_any_number_of_packets_leaves_room_for_the_ranks() -> None:
    """Limbs are normal after every addition: 2^22 of them can be summed (docs/protocol.md, 2)."""
    x = np.full((3, 1, 1), -1.0) * 2.0 ** np.array([60, 3, -70]).reshape(3, 1, 1)
    packet, words = packets([x], "float32")[0], empty(1)
    times = 5000
    for _ in range(times):
        native.add_packet(packet, words)
    for moment, power in ((5, 1), (13, 2)):
        limbs = words[moment : moment + 8].tolist()
        assert protocol.from_limbs(limbs) == times * sum(protocol.to_fixed(v**power) or 0 for v in x.reshape(-1).tolist())
        assert all(0 <= limb < 2**40 for limb in limbs[:-1]) and abs(limbs[-1]) < 2**40


@pytest.mark.parametrize("dtype", protocol.DTYPES)
def test_stored_statistics(dtype: str) -> None:
    """Without a packet the layer normalizes by its running statistics, exactly, and leaves them unchanged."""
    rng = np.random.default_rng(5)
    mean = rounded(rng.standard_normal(40) * 10.0 ** rng.integers(-3, 5, 40), "float32").astype(np.float32)
    variance = rounded(rng.standard_normal(40) ** 2 * 10.0 ** rng.integers(-6, 6, 40), "float32").astype(np.float32)
    mean[:2], variance[2:4] = (0, -0.0), (0, 1e-30)
    x = rounded(rng.standard_normal((2, 40, 3)), dtype)
    want = protocol.stored_statistics(mean.tolist(), variance.tolist(), EPS)
    kept = mean.copy(), variance.copy()
    y, stats = native.forward(
        native.shape(2, 40, 3, dtype), storage(x, dtype), None, EPS, running_mean=kept[0], running_var=kept[1]
    )
    assert same_bits(stats, np.array([[s.mean for s in want], [s.invstd for s in want]]))
    assert same_bits(y, storage(protocol.apply_forward(x, want, dtype), dtype))
    assert same_bits(kept[0], mean) and same_bits(kept[1], variance)


def test_average_weights() -> None:
    """The C++ equals the reference; and both are Caffe's recurrence, whose own sum of rounded terms is as far off as this."""
    for momentum in (0.0, 0.5, 0.9, 0.99, 0.999, 1.0):
        keep, s = float(np.float32(momentum)), 0.0
        for batches_before in range(3000):
            s = keep * s + 1
            weights = protocol.average_weights(momentum, batches_before)
            assert native.average_weights(momentum, batches_before) == weights
            old, new = weights
            assert new == pytest.approx(1 / s, rel=1e-12) and old == pytest.approx(1 - 1 / s, abs=1e-12)
        assert protocol.average_weights(momentum, 0) == (0.0, 1.0)
        assert native.average_weights(momentum, 10**15) == protocol.average_weights(momentum, 10**15)


def test_distance_between_statistics() -> None:
    old = [(np.array([0.0, 1.0], np.float32), "float32"), (np.array([1.0, 4.0], np.float32), "float32")]
    new = [(np.array([3.0, 1.0], np.float32), "float32"), (np.array([25.0, 4.0], np.float32), "float32")]
    assert population._distance(old, old) == 0
    assert population._distance(old, new) == pytest.approx(0.5)  # (3, 4) of 5 in one channel, nothing in the other
    gone = [(np.array([np.nan, 1.0], np.float32), "float32"), old[1]]
    assert population._distance(gone, new) == math.inf and population._distance(old, gone) == 0
