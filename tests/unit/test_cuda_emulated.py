"""The CUDA kernels, run by the emulator, give the bytes of the CPU core: packets, outputs, gradients, statistics.

test_native.py holds the CPU core to the pure-Python reference, and so this holds the kernels to it.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_syncbn import native, protocol
from tests import cuda_emulator
from tests import cuda_kernels as cuda
from tests.arrays import hostile, same_bits, storage
from tests.cuda_steps import EPS, frozen_step, step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, and there is none"),
]

CHANNELS = (1, 3, 5, 33, 70, 300)
POSITIONS = (1, 2, 7, 31, 32, 33, 49, 64, 65, 100, 4096, 4097, 8200)
SAMPLES = (1, 3, 40, 0)
LAUNCHES = [
    *((n, c, s, "channels_first") for n, c, s in ((1, 1, 9000), (40, 1, 2048), (70, 3, 100), (2, 40, 1100), (1, 150, 100))),
    *((n, c, s, "channels_first") for n, c, s in ((1, 5, 49), (700, 3, 9), (9, 300, 49), (1, 2000, 4), (3, 200, 64))),
    *((n, c, s, "channels_last") for n, c, s in ((1, 3, 9000), (40, 33, 70), (3, 900, 65), (2, 100, 1100), (30, 40, 49))),
    *((n, c, 1, "channels_last") for n, c in ((5, 1), (5, 2000), (3000, 5), (900, 64), (77, 333))),
]
# Elements of a case: so many blocks take a second.
MOST = 60_000


def emulated_step(
    n: int, c: int, s: int, dtype: str, layout: str, seed: int, *, multiprocessors: int = 4, **options: bool
) -> None:
    """`cuda_steps.step` on a device with so many multiprocessors."""
    cuda_emulator.configure(multiprocessors, seed)
    step(n, c, s, dtype, layout, seed, **options)


@pytest.mark.parametrize("layout", native.LAYOUTS)
@pytest.mark.parametrize("dtype", protocol.DTYPES)
def test_frozen_step_equals_cpu(dtype: str, layout: str) -> None:
    """A launch without a packet checks nothing, so it is not counted among those that report."""
    cuda_emulator.configure(4, 1)
    for i, (n, c, s) in enumerate([(3, 5, 7), (2, 33, 64), (4, 70, 1), (1, 2, 8200), (0, 3, 2)]):
        frozen_step(n, c, s, dtype, layout, i, relu=i % 2 == 0, parameter=protocol.DTYPES[i % 4])
    assert cuda.earlier_failure() == (native.OK, "")


def cases() -> list[tuple[int, int, int, str, str]]:
    """Every number of channels with every number of positions, in both layouts; samples and element types in turn."""
    result = []
    for i, (c, s, layout) in enumerate(itertools.product(CHANNELS, POSITIONS, native.LAYOUTS)):
        n = SAMPLES[i // 3 % len(SAMPLES)]
        if c * s <= 5 * MOST:
            result.append((n if n * c * s <= MOST else 1, c, s, protocol.DTYPES[i // 5 % 4], layout))
    return result


@pytest.mark.parametrize(("n", "c", "s", "dtype", "layout"), cases())
def test_step_equals_cpu(n: int, c: int, s: int, dtype: str, layout: str) -> None:
    seed = n + 7 * c + 131 * s
    emulated_step(
        n,
        c,
        s,
        dtype,
        layout,
        seed,
        relu=seed % 2 == 0,
        masked=seed % 5 == 0,
        misaligned=seed % 3 == 0,
        multiprocessors=(1, 4, 40)[seed % 7 % 3],
    )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 9),
    c=st.integers(1, 140),
    s=st.one_of(st.integers(1, 140), st.integers(4090, 4200)),
    dtype=st.sampled_from(protocol.DTYPES),
    layout=st.sampled_from(native.LAYOUTS),
    seed=st.integers(0, 2**32),
    relu=st.booleans(),
    masked=st.booleans(),
    misaligned=st.booleans(),
    multiprocessors=st.sampled_from((1, 3, 132)),
)
def test_any_step_equals_cpu(
    n: int, c: int, s: int, dtype: str, layout: str, seed: int, relu: bool, masked: bool, misaligned: bool, multiprocessors: int
) -> None:
    c = min(c, 1 + 20_000 // (n * s + 1))
    options = {"relu": relu, "masked": masked, "misaligned": misaligned, "multiprocessors": multiprocessors}
    emulated_step(n, c, s, dtype, layout, seed, **options)


@pytest.mark.parametrize("value", [-(2.0**118) * (1 - 2.0**-53), 2.0**100 * (1 - 2.0**-53)])
def test_limbs_do_not_overflow(value: float) -> None:
    """More values with all bits of a limb set than a packet takes from its blocks without a carry."""
    n = 5 * 2**22
    shape = native.shape(n, 1, 1, "float64")
    # A thread sees them in turn, and none fits where its predecessor put TwoPartSum: all go to the limbs.
    x = np.where(np.arange(n) // 4 % 2 == 0, value, value * 2.0**-50)
    cuda_emulator.configure(1, 0)
    assert same_bits(cuda.forward_moments(shape, x, None, EPS), native.forward_packet(shape, x, EPS))


@pytest.mark.parametrize("layout", native.LAYOUTS)
def test_wrong_packets_are_reported_and_give_nan(layout: str) -> None:
    rng = np.random.default_rng(0)
    shape = native.shape(2, 5, 3, "float32", layout)
    x = storage(rng.standard_normal((2, 5, 3)), "float32", layout)
    good = cuda.forward_moments(shape, x, None, EPS)
    disagree, one_value = good.copy(), good.copy()
    disagree[2] += 1
    one_value[1] = 1
    old = np.full(5, 3.0, np.float32)
    for packet, status, name in ((disagree, native.RANKS_DISAGREE, "first"), (one_value, native.ONE_VALUE, "second")):
        mean, var, y, dx = old.copy(), old.copy(), np.zeros_like(x), np.zeros_like(x)
        running = [cuda.vector(v) for v in (mean, var, mean, var)]
        vectors = (cuda.vector(None), cuda.vector(None), *running)
        stats = cuda.forward_apply(shape, EPS, x, None, True, packet, vectors, (0.9, 0.1), True, True, name, y)
        assert np.isnan(stats).all() and np.isnan(y).all()
        assert same_bits(mean, old) and same_bits(var, old)
        assert cuda.failure() == (status, name)
        assert cuda.failure() == (native.OK, "")
        stats = np.ones((2, 5))
        cuda.backward_apply(shape, x, x, None, None, packet, stats, cuda.vector(None), f"{name} back", dx, None)
        assert np.isnan(dx).all()
        status = native.CALLS_DIFFER if status == native.RANKS_DISAGREE else status
        assert cuda.failure() == (status, f"{name} back")
        # Without elements or channels: the header alone, as where no rank's dx is wanted.
        nothing = native.shape(0, 0, 0, "float32", layout)
        cuda.backward_apply(nothing, x, x, None, None, packet, stats, cuda.vector(None), f"{name} check", dx, None)
        assert cuda.failure() == (status, f"{name} check")


def test_nonfinite_channels_are_reported_once_and_hide_no_error() -> None:
    shape = native.shape(2, 5, 3, "float32")
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    good = cuda.forward_moments(shape, x, None, EPS)
    x[1, 3, 2] = np.inf
    bad = cuda.forward_moments(shape, x, None, EPS)
    one_value, total = good.copy(), bad.copy()
    one_value[1] = 1
    total[native.DIGEST] = 0  # a sum of batches, which were reported before
    y = np.zeros_like(x)

    def apply(packet: np.ndarray, name: str, skip: bool = True, stream: ctypes.c_void_p | None = None) -> list[np.ndarray]:
        old, new = [np.full(5, v, np.float32) for v in (3, 2)], [np.zeros(5, np.float32) for _ in range(2)]
        vectors = (cuda.vector(None), cuda.vector(None), *map(cuda.vector, (*old, *new)))
        cuda.forward_apply(shape, EPS, x, None, False, packet, vectors, (0.9, 0.1), True, skip, name, y, stream)
        return new

    rest = [0, 1, 2, 4]
    for skip, kept in ((True, [3, 2]), (False, [np.nan, np.nan])):
        mean, var = apply(bad, "bad", skip)
        assert same_bits(np.array([mean[3], var[3]]), np.array(kept, np.float32))
        assert (mean[rest] != 3).all() and (var[rest] != 2).all() and np.isfinite(mean[rest]).all()
        assert cuda.failure() == (native.NONFINITE, "bad") and cuda.failure() == (native.OK, "")
        mean, var = apply(total, "total", skip)
        assert same_bits(np.array([mean[3], var[3]]), np.array(kept, np.float32))
        assert cuda.failure() == (native.OK, "")
    # The launches of a graph share one word.
    for order in ((one_value, bad), (bad, one_value)):
        for packet in order:
            apply(packet, "error" if packet is one_value else "bad", stream=cuda.CAPTURING)
        assert cuda.failure() == (native.ONE_VALUE, "error") and cuda.failure() == (native.OK, "")
    apply(bad, "first")
    for _ in range(cuda.LAG - 1):
        assert cuda.earlier_failure() == (native.OK, "")
        apply(good, "good")
    assert cuda.earlier_failure() == (native.NONFINITE, "first")
    assert cuda.earlier_failure() == (native.OK, "")


def test_a_failure_is_told_a_fixed_number_of_launches_later() -> None:
    """On every rank at the same one, however far its host is ahead; not those of a graph, and each once."""
    shape = native.shape(2, 5, 3, "float32")
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    good = cuda.forward_moments(shape, x, None, EPS)
    one_value = good.copy()
    one_value[1] = 1
    y = np.zeros_like(x)

    def apply(packet: np.ndarray | None, name: str, stream: ctypes.c_void_p | None = None) -> None:
        none = tuple(cuda.vector(None) for _ in range(6))
        cuda.forward_apply(shape, EPS, x, None, False, packet, none, (0.9, 0.1), True, True, name, y, stream)

    assert f"#define HVD_SYNCBN_CUDA_LAG {cuda.LAG}\n" in (cuda_emulator.CSRC / "include/hvd_syncbn/cuda.h").read_text()
    apply(one_value, "first")
    apply(one_value, "captured", cuda.CAPTURING)
    apply(one_value, "second")
    for _ in range(cuda.LAG - 2):
        assert cuda.earlier_failure() == (native.OK, "")
        apply(good, "good")
        apply(None, "frozen")  # is not counted
    assert cuda.earlier_failure(cuda.CAPTURING) == (native.OK, "")
    assert cuda.earlier_failure() == (native.ONE_VALUE, "first")
    apply(good, "good")
    assert cuda.earlier_failure() == (native.ONE_VALUE, "second")
    for _ in range(2 * cuda.LAG):
        apply(good, "good")
        assert cuda.earlier_failure() == (native.OK, "")
    assert cuda.failure() == (native.ONE_VALUE, "captured")
    # What has been looked for is not told again.
    apply(one_value, "third")
    assert cuda.failure() == (native.ONE_VALUE, "third")
    for _ in range(2 * cuda.LAG):
        apply(good, "good")
        assert cuda.earlier_failure() == (native.OK, "")
    assert cuda.failure() == (native.OK, "")


def test_an_empty_global_batch_changes_no_running_statistic() -> None:
    """Where the new statistics are another vector, as TensorFlow has it, they are the old ones."""
    shape = native.shape(0, 4, 3, "float32")
    x = np.empty((0, 4, 3), np.float32)
    packet = cuda.forward_moments(shape, x, None, EPS)
    mean, var = np.arange(4, dtype=np.float32), np.arange(4, 8, dtype=np.float32)
    new_mean, new_var = np.zeros(4, np.float32), np.zeros(4, np.float32)
    vectors = (cuda.vector(None), cuda.vector(None), *(cuda.vector(v) for v in (mean, var, new_mean, new_var)))
    stats = cuda.forward_apply(shape, EPS, x, None, False, packet, vectors, (0.9, 0.1), True, True, "layer", x)
    assert same_bits(new_mean, mean) and same_bits(new_var, var)
    assert same_bits(stats, native.forward(shape, x, packet, EPS)[1])
    assert cuda.failure() == (native.OK, "")


@pytest.mark.parametrize("layout", native.LAYOUTS)
@pytest.mark.parametrize(("n", "c", "s"), [(0, 5, 3), (130, 33, 1), (9, 70, 49), (3, 33, 100), (2, 5, 4097), (1, 5, 9000)])
def test_apply_prefetches_inside_its_inputs(n: int, c: int, s: int, layout: str) -> None:
    """Once per address, in all inputs alike, and in the last sample, which comes first."""
    cuda_emulator.configure(2, n)
    rng = np.random.default_rng(s)
    shape = native.shape(n, c, s, "float32", layout)
    x, dy, residual = (cuda.guarded(storage(rng.standard_normal((n, c, s)), "float32", layout)) for _ in range(3))
    packet = cuda.forward_moments(shape, x, None, EPS)
    y, dx = cuda.guarded(np.zeros_like(x)), cuda.guarded(np.zeros_like(x))
    vectors = tuple(cuda.vector(None) for _ in range(6))
    stats = cuda.forward_apply(shape, EPS, x, residual, True, packet, vectors, (0.9, 0.1), True, True, "layer", y)
    found = [(cuda_emulator.prefetched(), (x, residual))]
    cuda.backward_apply(shape, x, dy, y, None, packet, stats, cuda.vector(None), "layer", dx, None)
    found.append((cuda_emulator.prefetched(), (x, dy, y)))
    cuda.failure()  # of a forward packet where a backward one belongs
    for addresses, arrays in found:
        assert len(np.unique(addresses)) == len(addresses)
        inside = [np.sort(addresses[(addresses >= a.ctypes.data) & (addresses < a.ctypes.data + a.nbytes)]) for a in arrays]
        assert sum(map(len, inside)) == len(addresses)
        for array, own in zip(arrays, inside, strict=True):
            assert len(own) > 0 or n == 0
            assert same_bits(own - array.ctypes.data, inside[0] - arrays[0].ctypes.data)
            if n:
                assert int(own[-1]) >= array.ctypes.data + array.nbytes - array.nbytes // n


def fewest_splits(tiles: int, turns: int, wave: int) -> int:
    """The rule of csrc/cuda/device.cuh, by trying every number of splits."""
    most = min(turns, max(8 * wave // tiles, 1))
    times = {splits: -(-tiles * splits // wave) * -(-turns // splits) for splits in range(1, most + 1)}
    for splits, time in times.items():
        if 16 * tiles * turns >= 15 * time * wave:
            return splits
    return min(times, key=lambda splits: (times[splits], -(-turns // splits), splits), default=1)


# Few and many tiles; few and many items: channels first in pieces and in planes; channels last in pieces and by position.
@pytest.mark.parametrize("resident", [4, 5, 7])
@pytest.mark.parametrize(("n", "c", "s", "layout"), LAUNCHES)
def test_launches_are_whole_waves(n: int, c: int, s: int, layout: str, resident: int) -> None:
    multiprocessors = 3
    cuda_emulator.configure(multiprocessors, n, resident)
    wave = multiprocessors * resident
    rng = np.random.default_rng(c)
    shape = native.shape(n, c, s, "float32", layout)
    x, dy = (storage(rng.standard_normal((n, c, s)), "float32", layout) for _ in range(2))
    packet = cuda.forward_moments(shape, x, None, EPS)
    assert same_bits(packet, native.forward_packet(shape, x, EPS))
    pieces = -(-s // protocol.PIECE)
    if layout == "channels_last" or s == 1:
        tiles, turns = -(-c // 32), -(-n // (32 if s == 1 else 4)) if s <= 64 else n * pieces
    elif s <= 64:
        rows = min(128, (47 * 1024 - 17 * 129 * 8 - 24) // ((s | 1) * 4))
        tiles, turns = (1, -(-n // (rows // c))) if c < rows else (-(-c // rows), n)
    else:
        threads = 8 if s % 4 == 0 and n * pieces * c * 8 >= 256 * multiprocessors else 32
        tiles, turns = c, -(-n * pieces // (128 // threads))
    assert cuda_emulator.blocks() == tiles * fewest_splits(tiles, turns, wave)

    y, dx = np.zeros_like(x), np.zeros_like(x)
    vectors = tuple(cuda.vector(None) for _ in range(6))
    stats = cuda.forward_apply(shape, EPS, x, None, False, packet, vectors, (0.9, 0.1), True, True, "layer", y)
    want_y, _ = native.forward(shape, x, packet, EPS)
    assert same_bits(y, want_y)
    forward_blocks = cuda_emulator.blocks()
    back = cuda.backward_moments(shape, x, dy, None, None, stats, cuda.vector(None), cuda.vector(None))
    cuda.backward_apply(shape, x, dy, None, None, back, stats, cuda.vector(None), "layer", dx, None)
    assert same_bits(dx, native.backward(shape, x, dy, back, stats)[0])
    if layout == "channels_last" or s == 1:
        width = 4 if c % 4 == 0 else 1
        columns = -(-c // width)
        tile = -(-columns // -(-columns // 32))
        tiles, turns = -(-columns // tile), -(-n * s // (4 * (256 // tile)))
    elif s >= 4096:
        tiles, turns = c, n * -(-s // 8192)
    else:
        width = 4 if c * s % 4 == 0 and s >= 4 else 1
        rows = math.ceil(math.ceil(4096 / s) / width) * width
        tiles, turns = -(-c // min(rows, c, 256)), n
    assert forward_blocks == tiles * fewest_splits(tiles, turns, wave)
    assert cuda_emulator.blocks() == forward_blocks

    # The same launch once more, on the same device and then on another one.
    calls = cuda_emulator.occupancy_calls()
    cuda.forward_moments(shape, x, None, EPS)
    assert cuda_emulator.occupancy_calls() == calls
    cuda_emulator.configure(multiprocessors, n, resident + 10 * n + 1000 * c + 7)
    cuda.forward_moments(shape, x, None, EPS)
    assert cuda_emulator.occupancy_calls() == calls + 1


@pytest.mark.parametrize("dtype", protocol.DTYPES)
@pytest.mark.parametrize(("n", "c", "s"), [(3, 264, 49), (2, 136, 9), (5, 16, 49), (1, 133, 49), (2, 264, 64), (3, 24, 33)])
def test_planes_with_more_shared_memory(n: int, c: int, s: int, dtype: str) -> None:
    """Of an H100 and of an A100: more rows than fit 48 KiB. The first launch again after one that needs less."""
    for shared_kib in (228, 164):
        for positions in (s, 17, s):
            cuda_emulator.configure(3, c, shared_kib=shared_kib)
            step(n, c, positions, dtype, "channels_first", s, relu=n % 2 == 0)


def test_rows_follow_the_shared_memory() -> None:
    """Backward, float64, 7x7: 38 rows of a tile in 47 KiB, 74 in a third of an H100's multiprocessor."""
    shape = native.shape(1, 400, 49, "float64")
    x = np.ones((1, 400, 49))
    for shared_kib, rows in ((64, 38), (100, 38), (228, 72)):
        cuda_emulator.configure(1, 0, shared_kib=shared_kib)
        cuda.backward_moments(shape, x, x, None, None, np.ones((2, 400)), cuda.vector(None), cuda.vector(None))
        assert cuda_emulator.blocks() == -(-400 // rows)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("n", "c", "s"), [(2, 64, 65), (1, 66, 1100), (3, 130, 100), (1, 2, 2049), (2, 34, 196)])
def test_two_channels_per_thread(n: int, c: int, s: int, dtype: str) -> None:
    """Of 16-bit types, channels last, and one where accesses are not aligned or there is a mask."""
    for options in ({}, {"relu": True}, {"misaligned": True}, {"masked": True}):
        emulated_step(n, c, s, dtype, "channels_last", s, multiprocessors=1, **options)


@pytest.mark.parametrize("layout", native.LAYOUTS)
@pytest.mark.parametrize("s", [1, 9])
def test_sums_of_short_pieces_stay_in_range(s: int, layout: str) -> None:
    """Many squares of 2^158 are each within what a packet holds; a thread must not add them up before."""
    shape = native.shape(400, 3, s, "float32", layout)
    for exponent in (60, 65, 66, 67, 70, 79, 80):
        x = np.zeros((400, 3, s))
        x[:, :, 0] = 2.0**exponent
        given = storage(x, "float32", layout)
        cuda_emulator.configure(1, exponent)
        assert same_bits(cuda.forward_moments(shape, given, None, EPS), native.forward_packet(shape, given, EPS))


SIGNIFICANT_BITS = {"bfloat16": 8, "float16": 11}
FIRST_UNIT = 2.0**-23  # of a thread's first lane


def integer_moments(x: np.ndarray, dtype: str, layout: str, mask: np.ndarray | None = None, offset: int = 0) -> tuple[int, int]:
    """Compare the forward packet of a GPU with little float64 with the CPU's, and return `cuda_emulator.integers`."""
    cuda_emulator.configure(1, x.size, float64_ratio=64)
    shape = native.shape(*x.shape, dtype, layout)
    given = cuda.guarded(storage(x, dtype, layout), offset)
    assert same_bits(cuda.forward_moments(shape, given, mask, EPS), native.forward_packet(shape, given, EPS, mask))
    return cuda_emulator.integers()


@pytest.mark.parametrize("layout", native.LAYOUTS)
@pytest.mark.parametrize("dtype", SIGNIFICANT_BITS)
@pytest.mark.parametrize(
    ("n", "c", "s"), [(70, 33, 1), (4, 34, 65), (2, 3, 66), (1, 5, 1023), (4, 34, 128), (9, 3, 1100), (1, 1, 2049)]
)
def test_integer_lanes_equal_cpu(n: int, c: int, s: int, dtype: str, layout: str) -> None:
    """Of common data few lanes are added up again in float64; hostile data, masks and unaligned arrays give the same bytes."""
    rng = np.random.default_rng(n + c + s)
    common = rng.standard_normal((n, c, s))
    elements, again = integer_moments(common, dtype, layout)
    assert elements == n * c * s
    assert again <= -(-elements // 32) // 4
    mask = (rng.random((n, s)) < 0.7).astype(np.uint8)
    tiny = common * 2.0 ** (-130 if dtype == "bfloat16" else -20)
    relu = np.maximum(common, 0) * rng.integers(0, 2, common.shape) * 2.0 ** rng.uniform(-14, 6, common.shape)
    for data in (hostile(rng, (n, c, s), dtype), hostile(rng, (n, c, s), dtype, nonfinite=False), tiny, relu, 0 * common):
        assert integer_moments(data, dtype, layout)[0] == n * c * s
        assert integer_moments(data, dtype, layout, mask, 1)[0] == n * c * s
    for exponent in (-10, -4, -2, 2, 4, 10):  # most lanes of a thread's first piece are beyond one of the limits
        integer_moments(common * 2.0**exponent, dtype, layout)
    if dtype == "bfloat16":  # sums of squares beside the end of what a packet holds
        for exponent in (74, 76, 78, 79, 80, 127):
            integer_moments(np.sign(common) * 2.0**exponent, dtype, layout)


@pytest.mark.parametrize("layout", native.LAYOUTS)
@pytest.mark.parametrize("dtype", SIGNIFICANT_BITS)
@pytest.mark.parametrize(("n", "c", "s"), [(1, 2, 1024), (1, 2, 1023), (4, 34, 1024), (40, 2, 1)])
def test_limits_of_integer_lanes(n: int, c: int, s: int, dtype: str, layout: str) -> None:
    """Each limit, met and exceeded by the elements of one lane; and values that no integer holds."""
    bits = SIGNIFICANT_BITS[dtype]
    # In 2-D input a lane is of 8 samples of a thread; 2^53 units^2 are the squares of 8 elements of 2^25 units, or 32 of 2^24.
    lane, most = ((slice(0, 32, 4), 1, 0), 4.0) if s == 1 else ((0, 1, slice(5, None, 32)), 2.0)
    least = FIRST_UNIT * 2.0 ** (bits - 1)  # a whole number of units, whatever its significant bits
    above = 1 + 2.0 ** (1 - bits)  # the next larger significand
    odd = least * (1 - 2.0**-bits)  # the next smaller value: its last bit is half a unit
    for first, rest, is_exact in (
        (least, most / 2, True),
        (-least * above, most / 2, True),
        (odd, most / 2, False),
        (-odd, 0.0, False),
        (0.0, most, True),
        (-0.0, -most, True),
        (most, most, True),
        (-most * above, most, False),
        (most, -most * above, False),
        (2.0**8 if s == 1 else 2.0**10, most, False),
        (math.nan, 1.0, False),
        (-math.inf, 1.0, False),
    ):
        x = np.zeros((n, c, s))
        x[lane] = rest
        x[lane][1::2] *= -1
        x[lane][0] = first
        _, again = integer_moments(x, dtype, layout)
        assert again == (0 if is_exact else 1), (first, rest)


@pytest.mark.parametrize("layout", native.LAYOUTS)
@pytest.mark.parametrize("dtype", SIGNIFICANT_BITS)
@pytest.mark.parametrize(("n", "c", "s"), [(256, 2, 100), (4096, 2, 1), (64, 2, 2052)])
def test_unit_follows_the_data(n: int, c: int, s: int, dtype: str, layout: str) -> None:
    """After its first lanes a thread adds up integers, also after NaN, and in short and long pieces."""
    rng = np.random.default_rng(0)
    lanes = n * c // 8 if s == 1 else n * c * 32 * (s // 1024 + 1)
    for scale in (2.0**-9, 2.0**9):
        x = scale * (1.5 + rng.random((n, c, s))) * rng.choice([-1, 1], (n, c, s))
        x[0, 0, 0] = math.nan
        _, again = integer_moments(x, dtype, layout)
        assert 0 < again <= lanes // 4


def test_integers_only_where_float64_is_little() -> None:
    """Of other devices, types and short pieces nothing becomes an integer."""
    x = np.random.default_rng(0).standard_normal((3, 5, 100))
    for layout in native.LAYOUTS:
        for dtype in protocol.DTYPES:
            for s in (1, 2, 64, 65):
                for ratio in (2, 15, 16, 64):
                    data = storage(x[..., :s], dtype, layout)
                    shape = native.shape(3, 5, s, dtype, layout)
                    cuda_emulator.configure(4, s, float64_ratio=ratio)
                    packet = cuda.forward_moments(shape, data, None, EPS)
                    assert same_bits(packet, native.forward_packet(shape, data, EPS))
                    is_integer = ratio >= 16 and dtype in SIGNIFICANT_BITS and s in (1, 65)
                    assert cuda_emulator.integers()[0] == (15 * s if is_integer else 0)
