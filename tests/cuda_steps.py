"""One training step by the CUDA kernels' C interface, beside the CPU core: on the emulated device and on a GPU."""

from __future__ import annotations

import numpy as np

from hvd_syncbn import native, protocol
from tests import cuda_kernels as cuda
from tests.arrays import hostile, logical, same_bits, storage

EPS = 1e-5


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
    parameter: str | None = None,
) -> None:
    """Run one training step of a rank beside another one by the CUDA kernels and on the CPU, and compare the bytes.

    ``parameter``: the element type of weights and running statistics, which is drawn where it is None.
    """
    rng = np.random.default_rng(seed)
    offset = 1 if misaligned else 0
    x, dy = (hostile(rng, (n, c, s), dtype, nonfinite=bool(rng.random() < 0.3)) for _ in range(2))
    residual = hostile(rng, (n, c, s), dtype, nonfinite=False) if rng.random() < 0.5 else None
    xs, dys = (cuda.guarded(storage(v, dtype, layout), offset) for v in (x, dy))
    rs = None if residual is None else cuda.guarded(storage(residual, dtype, layout), offset)
    mask = (rng.random((n, s)) < 0.7).astype(np.uint8) * 3 if masked else None
    count = n * s if mask is None else int(np.count_nonzero(mask))
    drawn = str(rng.choice(protocol.DTYPES))
    parameter = parameter or drawn
    gamma, beta, mean, var = (storage(rng.standard_normal((1, c, 1)), parameter).reshape(c) for _ in range(4))
    affine = rng.random() < 0.8
    given_gamma, given_beta = (cuda.vector(v if affine else None, parameter) for v in (gamma, beta))
    shape = native.shape(n, c, s, dtype, layout)

    call = native.call_number("layer", bool(rng.random() < 0.5))
    packet = cuda.forward_moments(shape, xs, mask, EPS, call)
    assert same_bits(packet, native.forward_packet(shape, xs, EPS, mask, call=call))
    other = native.shape(2, c, 5, dtype, layout)
    their_x, their_dy = (storage(hostile(rng, (2, c, 5), dtype, nonfinite=False), dtype, layout) for _ in range(2))
    packet += native.forward_packet(other, their_x, EPS, call=call)

    # In float64, for native.forward takes no 16-bit vectors; a kernel rounds the same float64 values once.
    wide_gamma, wide_beta, want_mean, want_var = (logical(v, parameter) for v in (gamma, beta, mean, var))
    given = (wide_gamma, wide_beta) if affine else (None, None)
    running = (want_mean, want_var, (0.9, 0.1))
    skip = seed % 2 == 0
    want_y, want_stats = native.forward(
        shape, xs, packet, EPS, given[0], given[1], *running, residual=rs, relu=relu, skip_nonfinite=skip
    )
    y = cuda.guarded(np.zeros_like(want_y), offset)
    new_mean, new_var = cuda.guarded(mean), cuda.guarded(var)
    old = [cuda.vector(v, parameter) for v in (mean, var)]
    new = [cuda.vector(v, parameter) for v in (new_mean, new_var)]
    vectors = (given_gamma, given_beta, *old, *new)
    stats = cuda.forward_apply(shape, EPS, xs, rs, relu, packet, vectors, (0.9, 0.1), True, skip, "layer", y)
    assert same_bits(stats, want_stats)
    assert same_bits(y, want_y)
    for got, want in ((new_mean, want_mean), (new_var, want_var)):
        assert same_bits(logical(got, parameter), np.array([protocol.round_to(v, parameter) for v in want]))
    assert cuda.intact(y) and cuda.intact(new_mean) and cuda.intact(new_var)
    is_finite = not packet[native.HEADER : native.HEADER + c].any()

    ys = y if relu else None
    dgamma, dbeta = (cuda.guarded(np.empty_like(gamma)) for _ in range(2))
    packet = cuda.backward_moments(
        shape, xs, dys, ys, mask, stats, cuda.vector(dgamma, parameter), cuda.vector(dbeta, parameter)
    )
    assert same_bits(packet, native.backward_packet(shape, xs, dys, stats, ys, count))
    want_gradients = native.parameter_gradients(shape, packet, stats, parameter)
    assert same_bits(dgamma, want_gradients[0]) and same_bits(dbeta, want_gradients[1])
    assert cuda.intact(dgamma) and cuda.intact(dbeta)
    packet += native.backward_packet(other, their_x, their_dy, stats)

    want_dx, want_dresidual = native.backward(shape, xs, dys, packet, stats, given[0], ys, mask)
    dx = cuda.guarded(np.zeros_like(want_dx), offset)
    dresidual = cuda.guarded(np.zeros_like(want_dx), offset) if rng.random() < 0.5 else None
    cuda.backward_apply(shape, xs, dys, ys, mask, packet, stats, given_gamma, "layer", dx, dresidual)
    assert same_bits(dx, want_dx) and cuda.intact(dx)
    if dresidual is not None:
        assert same_bits(dresidual, want_dresidual) and cuda.intact(dresidual)
    assert cuda.failure() == ((native.OK, "") if is_finite else (native.NONFINITE, "layer"))
    assert cuda.failure() == (native.OK, "")


def frozen_step(n: int, c: int, s: int, dtype: str, layout: str, seed: int, *, relu: bool, parameter: str) -> None:
    """Run one training step of a frozen layer by the CUDA kernels and on the CPU, and compare the bytes."""
    rng = np.random.default_rng(seed)
    x, dy, residual = (storage(hostile(rng, (n, c, s), dtype), dtype, layout) for _ in range(3))
    gamma, beta, mean, var = (storage(abs(rng.standard_normal((1, c, 1))), parameter).reshape(c) for _ in range(4))
    wide_gamma, wide_beta, wide_mean, wide_var = (logical(v, parameter) for v in (gamma, beta, mean, var))
    shape = native.shape(n, c, s, dtype, layout)
    want_y, want_stats = native.forward(
        shape, x, None, EPS, wide_gamma, wide_beta, wide_mean, wide_var, residual=residual, relu=relu
    )
    y, new_mean, new_var = cuda.guarded(np.zeros_like(want_y)), cuda.guarded(np.zeros_like(mean)), cuda.guarded(var)
    vectors = [cuda.vector(v, parameter) for v in (gamma, beta, mean, var, new_mean, new_var)]
    stats = cuda.forward_apply(shape, EPS, x, residual, relu, None, tuple(vectors), (0.9, 0.1), True, True, "layer", y)
    assert same_bits(stats, want_stats)
    assert same_bits(y, want_y) and cuda.intact(y)
    assert same_bits(new_mean, mean) and same_bits(new_var, var) and cuda.intact(new_mean)

    ys = y if relu else None
    want_dx, want_dresidual = native.backward(shape, dy, dy, None, stats, wide_gamma, ys)
    dx, dresidual = cuda.guarded(np.zeros_like(want_dx)), cuda.guarded(np.zeros_like(want_dx))
    cuda.backward_apply(shape, dy, dy, ys, None, None, stats, vectors[0], "layer", dx, dresidual)
    assert same_bits(dx, want_dx) and cuda.intact(dx)
    assert same_bits(dresidual, want_dresidual) and cuda.intact(dresidual)
