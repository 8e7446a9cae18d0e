"""Launches of the kernels without PyTorch, for compute-sanitizer and Nsight Compute.

`python -m benchmarks.gpu.launches check` runs a training step of every form, element type and layout and compares the bytes
with the CPU's; `... profile` launches each kernel once in each layout.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np

from hvd_syncbn import native, protocol
from tests import cuda_kernels
from tests.arrays import storage
from tests.cuda_steps import EPS, step
from tests.gpu.driver import Driver

# Small: under a sanitizer a launch takes a hundred times as long. 2-D, 7x7, and rows of one and of two pieces.
CHECKED = [(130, 3, 1), (9, 40, 49), (2, 33, 100), (2, 3, 1100)]
PROFILED = (32, 256, 56 * 56)


def check() -> None:
    """Every form in every type and layout, with a mask in half of them."""
    for number, ((n, c, s), dtype, layout) in enumerate(itertools.product(CHECKED, protocol.DTYPES, native.LAYOUTS)):
        step(n, c, s, dtype, layout, number, relu=number % 3 != 0, masked=number % 2 == 0, misaligned=number % 5 == 0)
        print(f"equal: {n}x{c}x{s} {dtype} {layout}", flush=True)


def profile() -> None:
    """Eight launches: float32 with channels first, bfloat16 with channels last."""
    n, c, s = PROFILED
    rng = np.random.default_rng(0)
    for dtype, layout in (("float32", "channels_first"), ("bfloat16", "channels_last")):
        x, dy = (storage(rng.standard_normal(PROFILED), dtype, layout) for _ in range(2))
        y, dx = np.empty_like(x), np.empty_like(x)
        vectors = tuple(cuda_kernels.vector(np.ones(c, np.float32)) for _ in range(6))
        described = native.shape(n, c, s, dtype, layout)
        packet = cuda_kernels.forward_moments(described, x, None, EPS)
        stats = cuda_kernels.forward_apply(described, EPS, x, None, True, packet, vectors, (0.9, 0.1), True, True, "layer", y)
        back = cuda_kernels.backward_moments(described, x, dy, y, None, stats, vectors[0], vectors[1])
        cuda_kernels.backward_apply(described, x, dy, y, None, back, stats, vectors[2], "layer", dx, None)
        print(f"launched: {dtype} {layout}", flush=True)


def main() -> None:
    """Run what the first argument names."""
    cuda_kernels.use(Driver())
    {"check": check, "profile": profile}[sys.argv[1]]()


if __name__ == "__main__":
    main()
