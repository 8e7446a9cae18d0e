"""The CUDA kernels, run by the emulator, give the bytes of the CPU core: packets, outputs, gradients, statistics.

test_native.py holds the CPU core to the pure-Python reference, and so this holds the kernels to it.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_syncbn import native, protocol
from tests import cuda_emulator as cuda
from tests.arrays import NUMPY, hostile, same_bits, storage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, and there is none"),
]

EPS = 1e-5
CHANNELS = (1, 3, 5, 33, 70, 300)
POSITIONS = (1, 2, 7, 31, 32, 33, 49, 64, 65, 100, 4096, 4097, 8200)
SAMPLES = (1, 3, 40, 0)
# Elements of a case: so many blocks take a second.
MOST = 60_000


def step(
    n: int,
    c: int,
    s: int,
    dtype: str,
    layout: str,
    seed: int,
    *,
    relu: bool = False,
    masked: bool = False,
    misaligned: bool = False,
    multiprocessors: int = 4,
) -> None:
    """One training step of a rank beside another one, on the emulated device and on the CPU."""
    rng = np.random.default_rng(seed)
    cuda.configure(multiprocessors, seed)
    offset = 1 if misaligned else 0
    x, dy = (hostile(rng, (n, c, s), dtype, nonfinite=bool(rng.random() < 0.3)) for _ in range(2))
    residual = hostile(rng, (n, c, s), dtype, nonfinite=False) if rng.random() < 0.5 else None
    xs, dys = (cuda.guarded(storage(v, dtype, layout), offset) for v in (x, dy))
    rs = None if residual is None else cuda.guarded(storage(residual, dtype, layout), offset)
    mask = (rng.random((n, s)) < 0.7).astype(np.uint8) * 3 if masked else None
    count = n * s if mask is None else int(np.count_nonzero(mask))
    parameter = str(rng.choice(protocol.DTYPES))
    gamma, beta, mean, var = (storage(rng.standard_normal((1, c, 1)), parameter).reshape(c) for _ in range(4))
    affine = rng.random() < 0.8
    given_gamma, given_beta = (cuda.vector(v if affine else None, parameter) for v in (gamma, beta))
    shape = native.shape(n, c, s, dtype, layout)

    needs_gradient = bool(rng.random() < 0.5)
    packet = cuda.forward_moments(shape, xs, mask, EPS, needs_gradient)
    assert same_bits(packet, native.forward_packet(shape, xs, EPS, mask, needs_gradient=needs_gradient))
    other = native.shape(2, c, 5, dtype, layout)
    theirs = [storage(hostile(rng, (2, c, 5), dtype, nonfinite=False), dtype, layout) for _ in range(2)]
    packet += native.forward_packet(other, theirs[0], EPS, needs_gradient=needs_gradient)

    if parameter in ("float32", "float64"):  # what native.forward takes
        want_mean, want_var = mean.copy(), var.copy()
        want_y, want_stats = native.forward(
            shape,
            xs,
            packet,
            EPS,
            gamma if affine else None,
            beta if affine else None,
            want_mean,
            want_var,
            (0.9, 0.1),
            True,
            rs,
            relu,
        )
    else:
        want_mean = want_var = None
        wide_gamma, wide_beta = (v.view(NUMPY[parameter]).astype(np.float64) if affine else None for v in (gamma, beta))
        want_y, want_stats = native.forward(shape, xs, packet, EPS, wide_gamma, wide_beta, residual=rs, relu=relu)
    y = cuda.guarded(np.zeros_like(want_y), offset)
    new_mean, new_var = cuda.guarded(mean), cuda.guarded(var)
    old = [cuda.vector(v, parameter) for v in (mean, var)]
    new = [cuda.vector(v, parameter) for v in (new_mean, new_var)]
    vectors = (given_gamma, given_beta, *old, *new)
    stats = cuda.forward_apply(shape, EPS, xs, rs, relu, packet, vectors, (0.9, 0.1), True, "layer", y)
    assert same_bits(stats, want_stats)
    assert same_bits(y, want_y)
    if want_mean is not None:
        assert same_bits(new_mean, want_mean)
        assert same_bits(new_var, want_var)
    assert cuda.intact(y) and cuda.intact(new_mean) and cuda.intact(new_var)

    ys = y if relu else None
    dgamma, dbeta = (cuda.guarded(np.empty_like(gamma)) for _ in range(2))
    packet = cuda.backward_moments(
        shape, xs, dys, ys, mask, stats, cuda.vector(dgamma, parameter), cuda.vector(dbeta, parameter)
    )
    assert same_bits(packet, native.backward_packet(shape, xs, dys, stats, ys, count))
    want_gradients = native.parameter_gradients(shape, packet, stats, parameter)
    assert same_bits(dgamma, want_gradients[0]) and same_bits(dbeta, want_gradients[1])
    assert cuda.intact(dgamma) and cuda.intact(dbeta)
    packet += native.backward_packet(other, *theirs, stats)

    wide_gamma = gamma.view(NUMPY[parameter]).astype(np.float64) if affine else None
    want_dx, want_dresidual = native.backward(shape, xs, dys, packet, stats, wide_gamma, ys, mask)
    dx = cuda.guarded(np.zeros_like(want_dx), offset)
    dresidual = cuda.guarded(np.zeros_like(want_dx), offset) if rng.random() < 0.5 else None
    cuda.backward_apply(shape, xs, dys, ys, mask, packet, stats, given_gamma, "layer", dx, dresidual)
    assert same_bits(dx, want_dx) and cuda.intact(dx)
    if dresidual is not None:
        assert same_bits(dresidual, want_dresidual) and cuda.intact(dresidual)
    assert cuda.failure() == (native.OK, "")


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
    step(
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
    step(n, c, s, dtype, layout, seed, **options)


@pytest.mark.parametrize("value", [-(2.0**118) * (1 - 2.0**-53), 2.0**100 * (1 - 2.0**-53)])
def test_limbs_do_not_overflow(value: float) -> None:
    """More values with all bits of a limb set than a packet takes from its blocks without a carry."""
    n = 5 * 2**22
    shape = native.shape(n, 1, 1, "float64")
    # A thread sees them in turn, and none fits where its predecessor put TwoPartSum: all go to the limbs.
    x = np.where(np.arange(n) // 4 % 2 == 0, value, value * 2.0**-50)
    cuda.configure(1, 0)
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
        stats = cuda.forward_apply(shape, EPS, x, None, True, packet, vectors, (0.9, 0.1), True, name, y)
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


def test_a_failure_is_told_a_fixed_number_of_launches_later() -> None:
    """On every rank at the same one, however far its host is ahead; not those of a graph, and each once."""
    shape = native.shape(2, 5, 3, "float32")
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    good = cuda.forward_moments(shape, x, None, EPS)
    one_value = good.copy()
    one_value[1] = 1
    y = np.zeros_like(x)

    def apply(packet: np.ndarray, name: str, stream: ctypes.c_void_p | None = None) -> None:
        none = tuple(cuda.vector(None) for _ in range(6))
        cuda.forward_apply(shape, EPS, x, None, False, packet, none, (0.9, 0.1), True, name, y, stream)

    assert f"#define HVD_SYNCBN_CUDA_LAG {cuda.LAG}\n" in (cuda.CSRC / "include/hvd_syncbn/cuda.h").read_text()
    apply(one_value, "first")
    apply(one_value, "captured", cuda.CAPTURING)
    apply(one_value, "second")
    for _ in range(cuda.LAG - 2):
        assert cuda.earlier_failure() == (native.OK, "")
        apply(good, "good")
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
    stats = cuda.forward_apply(shape, EPS, x, None, False, packet, vectors, (0.9, 0.1), True, "layer", x)
    assert same_bits(new_mean, mean) and same_bits(new_var, var)
    assert same_bits(stats, native.forward(shape, x, packet, EPS)[1])
    assert cuda.failure() == (native.OK, "")
