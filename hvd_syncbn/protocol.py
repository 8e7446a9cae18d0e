"""The exact packed-moment protocol: its constants and a readable reference implementation.

Rules:

* Formulas exist only in this module and in the C++ under ``csrc/``. Tests check that both give bitwise identical results.
* All arithmetic uses Python ints and floats. A float is an IEEE float64. ``fma`` and rounding to narrower types are computed
  on integers, so nothing depends on the machine.
* Arrays are float64 numpy arrays viewed as ``[n, c, s]`` (sample, channel, position). They hold values of the ``dtype`` that is
  passed with them. numpy only stores them and does no arithmetic.
* The reference is slow (microseconds per element); it is meant for tests and for reading. ``docs/protocol.md`` explains each
  step.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

PROTOCOL_VERSION = 3
PIECE = 1024
LANES = 32
LIMBS = 8
LIMB_BITS = 40
LSB_EXP = -160
HEADER = 4

DTYPES = ("float32", "float64", "float16", "bfloat16")
"""Element types; the index is the code used in the digest and the C interface."""

Array = NDArray[np.float64]


# --- Rounding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Format:
    precision: int  # bits of the significand, the hidden one included
    lsb: int  # exponent of the least subnormal
    limit: int  # values of at least 2**limit are infinite


_FORMATS = {
    "float64": _Format(53, -1074, 1024),
    "float32": _Format(24, -149, 128),
    "float16": _Format(11, -24, 16),
    "bfloat16": _Format(8, -133, 128),
}


def _dyadic(value: float) -> tuple[int, int]:
    """Return integers ``(m, e)`` with ``value == m * 2**e``."""
    fraction, exponent = math.frexp(value)
    return int(fraction * 2.0**53), exponent - 53


def _round_dyadic(m: int, e: int, dtype: str) -> float:
    """Round ``m * 2**e`` to ``dtype``, to nearest, ties to even."""
    form = _FORMATS[dtype]
    magnitude = abs(m)
    drop = max(magnitude.bit_length() - form.precision, form.lsb - e)
    if drop > 0:
        rest = magnitude & ((1 << drop) - 1)
        magnitude >>= drop
        half = 1 << (drop - 1)
        if rest > half or (rest == half and magnitude & 1):
            magnitude += 1
        e += drop
    if magnitude.bit_length() + e > form.limit:
        return -math.inf if m < 0 else math.inf
    return math.copysign(math.ldexp(magnitude, e), -1.0 if m < 0 else 1.0)


def round_to(value: float, dtype: str) -> float:
    """Round a float64 once to ``dtype``; every NaN becomes the canonical one."""
    if math.isnan(value):
        return math.nan
    if not math.isfinite(value) or value == 0.0 or dtype == "float64":
        return value
    return _round_dyadic(*_dyadic(value), dtype)


def fma(a: float, b: float, c: float, dtype: str = "float64") -> float:
    """Return ``a * b + c``, rounded once."""
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        return a * b + c
    (ma, ea), (mb, eb), (mc, ec) = _dyadic(a), _dyadic(b), _dyadic(c)
    mp, ep = ma * mb, ea + eb
    e = min(ep, ec)
    total = (mp << (ep - e)) + (mc << (ec - e))
    if total == 0:
        negative = math.copysign(1, a) * math.copysign(1, b) < 0 and math.copysign(1, c) < 0 and mp == mc == 0
        return -0.0 if negative else 0.0
    return _round_dyadic(total, e, dtype)


# --- Pieces (section 1) -----------------------------------------------------------------------------------------------


def lane_sum(terms: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the two moments of one piece, summed in the canonical order.

    A term is ``(a, d)``, one element's contribution: ``a`` to the first moment, ``fma(a, d, .)`` to the second.
    """
    a = [0.0] * LANES
    b = [0.0] * LANES
    for i, (term, d) in enumerate(terms):
        a[i % LANES] += term
        b[i % LANES] = fma(term, d, b[i % LANES])
    w = LANES // 2
    while w:
        for j in range(w):
            a[j] += a[j + w]
            b[j] += b[j + w]
        w //= 2
    return a[0], b[0]


# --- Exact sums and the packet (section 2) ----------------------------------------------------------------------------


def to_fixed(value: float) -> int | None:
    """Return ``value`` in units of ``2**LSB_EXP``, rounded toward minus infinity; None if out of range or not finite."""
    if not math.isfinite(value) or abs(value) >= 2.0 ** (LIMBS * LIMB_BITS + LSB_EXP - 1):
        return None
    m, e = _dyadic(value)
    shift = e - LSB_EXP
    return m << shift if shift >= 0 else m >> -shift


def to_limbs(value: int) -> list[int]:
    """Return the limbs of an exact sum as in a packet: all but the last are in ``[0, 2**LIMB_BITS)``."""
    limbs = [(value >> (LIMB_BITS * i)) & ((1 << LIMB_BITS) - 1) for i in range(LIMBS - 1)]
    return [*limbs, value >> (LIMB_BITS * (LIMBS - 1))]


def from_limbs(limbs: Iterable[int]) -> int:
    """Return the integer that limbs represent; carries may be pending."""
    return sum(int(limb) << (LIMB_BITS * i) for i, limb in enumerate(limbs))


def _fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value


def call_number(name: str, needs_gradient: bool) -> int:
    """Return the number, unsigned and of 64 bits, that identifies a call in its forward digest.

    Engines that match collectives by order, such as torch.distributed, would otherwise add up packets of different layers.
    """
    return (_fnv1a(name.encode()) << 1 | needs_gradient) % 2**64


def forward_digest(eps: float, dtype: str, channels: int, call: int = 0) -> int:
    """Return a 32-bit digest that differs between ranks that cannot share a batch.

    FNV-1a over protocol version, dtype, channel count, eps, and the number of the call (``call_number``, or 0).
    """
    return _folded(_fnv1a(struct.pack("<qqqdQ", PROTOCOL_VERSION, DTYPES.index(dtype), channels, eps, call)))


def backward_digest(statistics: Sequence[Statistics]) -> int:
    """Return a 32-bit digest that identifies a call of the layer by its batch statistics, which are equal on all ranks."""
    total = 0
    for c, stat in enumerate(statistics):
        a, b = _bits(stat.mean) ^ (c * 0x9E3779B97F4A7C15 % 2**64), _bits(stat.invstd)
        value = a * 0xBF58476D1CE4E5B9 % 2**64
        value = ((value ^ (value >> 29)) + (b ^ (b >> 32))) * 0x94D049BB133111EB % 2**64
        total += value ^ (value >> 32)
    return _folded(total * 0xD6E8FEB86659FD93 % 2**64)


def _bits(value: float) -> int:
    """Return the bits of a float64; every NaN is the canonical one."""
    return 0x7FF8000000000000 if math.isnan(value) else int.from_bytes(struct.pack("<d", value), "little")


def _folded(value: int) -> int:
    return (value ^ (value >> 32)) % 2**32


def _wrap(value: int) -> int:
    """Return the int64 with the low 64 bits of ``value``."""
    return (value + 2**63) % 2**64 - 2**63


@dataclass
class Packet:
    """The packet of one rank, or the sum of the packets of all ranks."""

    participants: int
    count: int
    check: tuple[int, int]
    nonfinite: list[int]
    a: list[int]
    b: list[int]

    def words(self) -> list[int]:
        """Return the packet as sent: ``HEADER + C + 2 * C * LIMBS`` int64 words."""
        limbs = [limb for moment in (self.a, self.b) for value in moment for limb in to_limbs(value)]
        return [self.participants, self.count, *map(_wrap, self.check), *self.nonfinite, *limbs]

    def __add__(self, other: Packet) -> Packet:
        return Packet(
            self.participants + other.participants,
            self.count + other.count,
            (self.check[0] + other.check[0], self.check[1] + other.check[1]),
            [p + q for p, q in zip(self.nonfinite, other.nonfinite, strict=True)],
            [p + q for p, q in zip(self.a, other.a, strict=True)],
            [p + q for p, q in zip(self.b, other.b, strict=True)],
        )

    def agreed(self) -> bool:
        """Return whether all participants sent the same digest.

        The left side is the sum of the squared differences over all pairs of digests, modulo 2**64.
        """
        return (self.participants * self.check[1] - self.check[0] ** 2) % 2**64 == 0


def _packet(terms: Sequence[Sequence[Sequence[tuple[float, float]]]], channels: int, digest: int, count: int) -> Packet:
    """Return a packet from ``terms[n][c]``, the terms of each row."""
    packet = replace(empty_packet(channels, digest), count=count)
    for sample in terms:
        for c, row in enumerate(sample):
            for start in range(0, len(row), PIECE):
                _add_values(packet, c, lane_sum(row[start : start + PIECE]))
    return packet


def _add_values(packet: Packet, c: int, values: tuple[float, float]) -> None:
    """Add one value to each moment of channel ``c``, in place; count values that have no fixed-point form."""
    for moment, value in zip((packet.a, packet.b), values, strict=True):
        fixed = to_fixed(value)
        if fixed is None:
            packet.nonfinite[c] += 1
        else:
            moment[c] += fixed


def empty_packet(channels: int, digest: int = 0) -> Packet:
    """Return the packet of a rank without samples."""
    return Packet(1, 0, (digest, digest**2), [0] * channels, [0] * channels, [0] * channels)


def forward_packet(x: Array, eps: float, dtype: str, mask: NDArray[np.bool_] | None = None, call: int = 0) -> Packet:
    """Return the forward packet of one rank's ``x[n, c, s]``; ``mask[n, s]`` is False at positions that do not count."""
    n, channels, s = x.shape
    counts = np.ones((n, s), bool) if mask is None else mask
    rows = [
        [[(float(x[i, c, k]), float(x[i, c, k])) if counts[i, k] else (0.0, 0.0) for k in range(s)] for c in range(channels)]
        for i in range(n)
    ]
    return _packet(rows, channels, forward_digest(eps, dtype, channels, call), int(counts.sum()))


def backward_packet(
    x: Array,
    dy: Array,
    statistics: Sequence[Statistics],
    y: Array | None = None,
    count: int | None = None,
) -> Packet:
    """Return the backward packet of one rank; ``y`` is the output if the fused activation is relu.

    ``count`` defaults to ``n * s``; with a mask it is the number of unmasked positions. Every ``dy`` is summed all the same,
    because the output at a masked position depends on the statistics, too.
    """
    n, channels, s = x.shape

    def term(i: int, c: int, k: int) -> tuple[float, float]:
        g = float(dy[i, c, k])
        if y is not None and y[i, c, k] <= 0.0:
            g = 0.0
        return g, float(x[i, c, k]) - statistics[c].mean

    rows = [[[term(i, c, k) for k in range(s)] for c in range(channels)] for i in range(n)]
    return _packet(rows, channels, backward_digest(statistics), n * s if count is None else count)


# --- Finishing (section 3) --------------------------------------------------------------------------------------------

DoubleDouble = tuple[float, float]


def _two_sum(a: float, b: float) -> DoubleDouble:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_sum_in(a: float, b: float, compute: str) -> DoubleDouble:
    """Return the same in the compute type. (Rounding a float64 sum of two float32 again equals rounding once.)"""

    def add(p: float, q: float) -> float:
        return round_to(p + q, compute)

    s = add(a, b)
    t = add(s, -a)
    return s, add(add(a, -add(s, -t)), add(b, -t))


def _quick_two_sum(a: float, b: float) -> DoubleDouble:
    s = a + b
    return s, b - (s - a)


def _subtract(a: DoubleDouble, b: DoubleDouble) -> DoubleDouble:
    s, e = _two_sum(a[0], -b[0])
    t, f = _two_sum(a[1], -b[1])
    s, e = _quick_two_sum(s, e + t)
    return _quick_two_sum(s, e + f)


def _multiply(a: DoubleDouble, b: DoubleDouble) -> DoubleDouble:
    p = a[0] * b[0]
    return _quick_two_sum(p, fma(a[1], b[0], fma(a[0], b[1], fma(a[0], b[0], -p))))


def _divide(a: DoubleDouble, n: float) -> DoubleDouble:
    q = a[0] / n
    r = fma(-q, n, a[0]) + a[1]
    return _quick_two_sum(q, r / n)


def read_sum(value: int) -> DoubleDouble:
    """Return an exact sum as a double-double, added from the highest limb down."""
    limbs = to_limbs(abs(value))
    top = limbs[-1] >> LIMB_BITS << LIMB_BITS  # the last limb has more bits than a float64 holds: add its upper part first
    hi, lo = math.ldexp(top, LIMB_BITS * (LIMBS - 1) + LSB_EXP), 0.0
    for i in reversed(range(LIMBS)):
        s, e = _two_sum(hi, math.ldexp(limbs[i] - (top if i == LIMBS - 1 else 0), LIMB_BITS * i + LSB_EXP))
        hi, lo = _quick_two_sum(s, e + lo)
    return (-hi, -lo) if value < 0 else (hi, lo)


@dataclass(frozen=True)
class Statistics:
    """The batch statistics of one channel in float64; ``var`` is biased."""

    mean: float
    var: float
    invstd: float


def finish_forward(packet: Packet, eps: float) -> list[Statistics]:
    """Return the statistics of every channel of a reduced packet."""
    nan = math.nan
    result = []
    for bad, a, b in zip(packet.nonfinite, packet.a, packet.b, strict=True):
        if bad:
            result.append(Statistics(nan, nan, nan))
            continue
        mean, var = (0.0, 0.0), 0.0  # no rank has a value, or all are masked: 0, as in Keras
        if packet.count:
            n = float(packet.count)
            sum_a = read_sum(a)
            mean = _divide(sum_a, n)
            var = _divide(_subtract(read_sum(b), _multiply(sum_a, mean)), n)[0]
            var = var if var > 0 else 0.0
        invstd = 1 / math.sqrt(var + eps) if var + eps > 0 else math.inf
        result.append(Statistics(mean[0], var, invstd))
    return result


def stored_statistics(mean: Sequence[float], var: Sequence[float], eps: float) -> list[Statistics]:
    """Return the statistics of a frozen layer, from its running statistics; its backward packet is ``empty_packet``."""
    sums = [float(v) + eps for v in var]
    return [
        Statistics(float(m), float(v), 1 / math.sqrt(s) if s > 0 else math.inf if s == 0 else math.nan)
        for m, v, s in zip(mean, var, sums, strict=True)
    ]


def running(
    old: float, batch: float, old_weight: float, new_weight: float, dtype: str = "float32", skip_nonfinite: bool = True
) -> float:
    """Return the new value of a running statistic stored in ``dtype``; the weights are rounded to float32 first.

    A batch statistic that is NaN leaves the old value unchanged, or makes it NaN without ``skip_nonfinite``.
    """
    if math.isnan(batch) and skip_nonfinite:
        return old
    return round_to(round_to(old_weight, "float32") * old + round_to(new_weight, "float32") * batch, dtype)


def average_weights(old_weight: float, batches: int) -> tuple[float, float]:
    """Return the weights of the old running statistic and of the batch's in a zero-debiased average.

    As in Caffe, ``s = old_weight * s + 1`` with every batch, and the batch has the weight ``1 / s``. With ``old_weight`` 1 all
    batches have equal weight. The closed form needs only the number of ``batches`` before this one.
    """
    keep = round_to(old_weight, "float32")
    if keep == 1:
        share = 1 / (batches + 1)
    else:
        power, base, n = 1.0, keep, batches + 1
        while n:
            if n & 1:
                power *= base
            base *= base
            n >>= 1
        share = (1 - keep) / (1 - power)
    return 1 - share, share


def unbiased(var: float, count: int) -> float:
    """Return the unbiased variance, which PyTorch averages; Keras averages the biased one."""
    return var * count / (count - 1)


def parameter_gradients(packet: Packet, statistics: Sequence[Statistics], dtype: str = "float32") -> list[tuple[float, float]]:
    """Return this rank's ``(dgamma, dbeta)`` of every channel, from its own packet before the collective."""
    result = []
    for bad, a, b, stat in zip(packet.nonfinite, packet.a, packet.b, statistics, strict=True):
        if bad or math.isnan(stat.mean):
            result.append((math.nan, math.nan))
        else:
            result.append((round_to(stat.invstd * read_sum(b)[0], dtype), round_to(read_sum(a)[0], dtype)))
    return result


# --- Statistics of a data set (section 9) -----------------------------------------------------------------------------


def add_batch(total: Packet, batch: Packet) -> Packet:
    """Return ``total`` plus one global batch's means and unbiased variances as exact sums; its count is the number of batches.

    A batch without values adds nothing.

    Raises:
        ValueError: the batch has one value per channel.
    """
    if batch.count == 0:
        return total
    if batch.count == 1:
        raise ValueError("expected more than 1 value per channel in a batch. Received: 1")
    result = total + replace(batch, count=1, nonfinite=[0] * len(batch.a), a=[0] * len(batch.a), b=[0] * len(batch.b))
    for c, stat in enumerate(finish_forward(batch, 0.0)):
        _add_values(result, c, (stat.mean, unbiased(stat.var, batch.count)))
    return result


def pooled_population(total: Packet, convention_unbiased: bool) -> list[tuple[float, float]]:
    """Return ``(mean, variance)`` of every channel, over all values whose packets ``total`` sums."""
    return [
        (stat.mean, unbiased(stat.var, total.count) if convention_unbiased else stat.var) for stat in finish_forward(total, 0.0)
    ]


def batches_population(total: Packet) -> list[tuple[float, float]]:
    """Return ``(mean, variance)`` of every channel: the averages of the values that ``add_batch`` added."""
    return [
        (math.nan, math.nan) if bad else (_divide(read_sum(a), total.count)[0], _divide(read_sum(b), total.count)[0])
        for bad, a, b in zip(total.nonfinite, total.a, total.b, strict=True)
    ]


def identity_gamma(variance: float, eps: float, dtype: str = "float32") -> float:
    """Return the gamma that makes a layer with this stored variance the identity; its beta is the stored mean."""
    return round_to(math.sqrt(variance + eps), dtype)


# --- Applying (section 4) ---------------------------------------------------------------------------------------------


def _compute_type(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


# A mean of more standard deviations than this is subtracted first.
FAR_MEAN = 2.0**20


def _add_product(a: float, b: float, c: float) -> DoubleDouble:
    """Return ``a + b * c`` as a double-double."""
    product = b * c
    hi, lo = _two_sum(a, product)
    return hi, lo + fma(b, c, -product)


def _narrowed(value: DoubleDouble, compute: str) -> DoubleDouble:
    """Return the same value as a sum of two values of the compute type."""
    hi = round_to(value[0], compute)
    return hi, round_to((value[0] - hi) + value[1], compute)


def _power_of_two(value: float, compute: str) -> float:
    """Return the largest power of two up to ``|value|``, at least the smallest normal one; 1 if ``value`` is not finite."""
    if not math.isfinite(value):
        return 1.0
    form = _FORMATS[compute]
    return math.ldexp(1.0, max(math.frexp(value)[1] - 1 if value else form.lsb, form.lsb + form.precision - 1))


def apply_forward(
    x: Array,
    statistics: Sequence[Statistics],
    dtype: str,
    gamma: Sequence[float] | None = None,
    beta: Sequence[float] | None = None,
    residual: Array | None = None,
    relu: bool = False,
) -> Array:
    """Return ``y[n, c, s]``, values of ``dtype``."""
    compute = _compute_type(dtype)
    y = np.empty_like(x)
    for c, stat in enumerate(statistics):
        pivot = round_to(stat.mean, compute) if abs(stat.mean) * stat.invstd > FAR_MEAN else 0.0
        scale, scale_lo = _narrowed(((1.0 if gamma is None else float(gamma[c])) * stat.invstd, 0.0), compute)
        whole_shift = _add_product(0.0 if beta is None else float(beta[c]), -(stat.mean - pivot), scale + scale_lo)
        shift, shift_lo = _narrowed(whole_shift, compute)
        for i, k in np.ndindex(x.shape[0], x.shape[2]):
            d = round_to(float(x[i, c, k]) - pivot, compute)
            high, low = shift, fma(d, scale_lo, shift_lo, compute)
            if residual is not None:
                high, lost = _two_sum_in(shift, float(residual[i, c, k]), compute)
                low = round_to(low + (0.0 if math.isnan(lost) else lost), compute)
            v = round_to(fma(d, scale, high, compute) + low, compute)
            if relu and v <= 0.0:
                v = 0.0
            y[i, c, k] = round_to(v, dtype)
    return y


def apply_backward(
    x: Array,
    dy: Array,
    packet: Packet,
    statistics: Sequence[Statistics],
    dtype: str,
    gamma: Sequence[float] | None = None,
    y: Array | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> tuple[Array, Array]:
    """Return ``(dx, dresidual)`` from the reduced packet; ``y`` is the output if the fused activation is relu."""
    compute = _compute_type(dtype)
    dx, dresidual = np.empty_like(x), np.empty_like(x)
    n = float(packet.count)
    for c, stat in enumerate(statistics):
        if packet.nonfinite[c]:
            unit = scale = scale_lo = slope = shift = shift_lo = math.nan
        else:
            dy_mean = dyd_mean = 0.0
            if packet.count:
                dy_mean = _divide(read_sum(packet.a[c]), n)[0]
                dyd_mean = stat.invstd * stat.invstd * _divide(read_sum(packet.b[c]), n)[0]
            whole = (1.0 if gamma is None else float(gamma[c])) * stat.invstd
            unit = _power_of_two(round_to(whole, compute), compute)
            slope = round_to(-(whole / unit) * dyd_mean, compute)
            shift, shift_lo = _narrowed(_add_product(-(whole / unit * dy_mean), -stat.mean, slope), compute)
            scale, scale_lo = _narrowed((whole / unit, 0.0), compute)
        for i, k in np.ndindex(x.shape[0], x.shape[2]):
            g = float(dy[i, c, k])
            if y is not None and y[i, c, k] <= 0.0:
                g = 0.0
            dresidual[i, c, k] = round_to(g, dtype)
            if mask is not None and not mask[i, k]:
                low = round_to(scale_lo * g, compute)
            else:
                high, low = fma(float(x[i, c, k]), slope, shift, compute), fma(scale_lo, g, shift_lo, compute)
                low = round_to(high + low, compute)
            v = fma(scale, g, low, compute)
            dx[i, c, k] = round_to(round_to(unit * v, compute), dtype)
    return dx, dresidual
