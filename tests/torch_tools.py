"""What the PyTorch tests share: one training step, its results, how they are compared, and torch.nn's layer beside ours."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvd_syncbn import native, protocol
from hvd_syncbn.torch import SyncBatchNorm
from tests.arrays import NUMPY, same_bits

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("contiguous", "channels_last")
SHAPES = [(7, 5), (6, 5, 9), (4, 5, 6, 7), (3, 5, 4, 3, 6)]
# Against torch.nn; see test_torch_layer.py.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2**-7, torch.float16: 2**-10}
WEIGHTS = 1e-7  # running statistics of any type: the protocol rounds 1 - momentum and momentum to float32

Result = dict[str, Tensor]


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The values, contiguous, also of bfloat16, which PyTorch does not hand to numpy."""
    tensor = tensor.detach().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    return tensor.view(torch.uint16).numpy().view(NUMPY[name]) if name == "bfloat16" else tensor.numpy()


def to_torch(values: np.ndarray, dtype: str = "float32") -> Tensor:
    """A tensor of `values`, rounded to `dtype` by numpy."""
    array = np.ascontiguousarray(values, NUMPY[dtype])
    return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16) if dtype == "bfloat16" else torch.from_numpy(array)


def assert_same(got: Any, want: Any, what: str = "result") -> None:
    """Equal bytes: of two tensors, or of all those that two mappings or sequences hold."""
    if isinstance(want, Mapping):
        assert got.keys() == want.keys(), what
        for key in want:
            assert_same(got[key], want[key], f"{what} {key}")
    elif isinstance(want, Sequence):
        for i, pair in enumerate(zip(got, want, strict=True)):
            assert_same(*pair, f"{what} {i}")
    elif want is None:
        assert got is None, what
    else:
        a, b = to_numpy(got), to_numpy(want)
        assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: {a.dtype} {a.shape}, expected {b.dtype} {b.shape}"
        if not same_bits(a, b):
            different = np.flatnonzero(a.reshape(-1).view(f"u{a.itemsize}") != b.reshape(-1).view(f"u{b.itemsize}"))
            i = different[0]
            raise AssertionError(
                f"{what}: {len(different)} of {a.size} values differ, the first at {i}: "
                f"{a.reshape(-1)[i]}, expected {b.reshape(-1)[i]}"
            )


def error_of(call: Callable[[], Any]) -> BaseException:
    """Return what a call raises."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("no error")


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every rank, whatever was drawn before."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """A copy of `x` that lies in memory as named, for any number of dimensions."""
    if layout == "contiguous":
        return x.contiguous().clone(memory_format=torch.contiguous_format)
    return x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def randomize(layer: nn.Module, seed: int = 0) -> Any:
    """The layer with parameters and running statistics that are not 0 or 1."""
    with torch.no_grad():
        for i, (name, tensor) in enumerate((*layer.named_parameters(), *layer.named_buffers())):
            if tensor.is_floating_point():
                values = randn(1000 * seed + i, *tensor.shape, dtype=tensor.dtype)
                tensor.copy_(values.abs() + 0.5 if "var" in name else values)
    return layer


def step(layer: nn.Module, x: Tensor, dy: Tensor, residual: Tensor | None = None) -> Result:
    """One forward and backward pass: everything that comes out of it, by name."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    if residual is None:
        y = layer(x)
    else:
        residual = residual.detach().requires_grad_()
        y = layer(x, residual=residual)
    y.backward(dy)
    return {
        "y": y.detach(),
        "dx": x.grad,
        **({} if residual is None else {"dresidual": residual.grad}),
        **{f"d{name}": p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None},
        **{name: b.clone() for name, b in layer.named_buffers()},
    }


def reference_step(parts: Sequence[Sequence[np.ndarray]], layer: SyncBatchNorm, dtype: str) -> list[Result]:
    """What `step` has to return on every rank, by the pure-Python reference.

    Args:
        parts: each rank's float64 `(x, dy)` or `(x, dy, residual)`, any number of dimensions; values of `dtype`.
        layer: with float32 parameters, running statistics, and its state before the step.
        dtype: of the inputs.
    """
    shapes = [part[0].shape for part in parts]
    flat = [[values.reshape(*values.shape[:2], -1) for values in part] for part in parts]
    eps, relu = layer.eps, layer.activation == "relu"
    assert layer.running_mean is not None and layer.running_var is not None
    mean, var = (to_numpy(tensor).astype(np.float64) for tensor in (layer.running_mean, layer.running_var))
    gamma, beta = (to_numpy(tensor).astype(np.float64).tolist() for tensor in (layer.weight, layer.bias))
    packet = functools.reduce(operator.add, (protocol.forward_packet(part[0], eps, dtype) for part in flat))
    statistics = protocol.finish_forward(packet, eps)
    residuals = [part[2] if len(part) > 2 else None for part in flat]
    outputs = [
        protocol.apply_forward(part[0], statistics, dtype, gamma, beta, residual, relu)
        for part, residual in zip(flat, residuals, strict=True)
    ]
    masks = outputs if relu else [None] * len(parts)
    own = [protocol.backward_packet(part[0], part[1], statistics, mask) for part, mask in zip(flat, masks, strict=True)]
    back = functools.reduce(operator.add, own)

    def running(old: np.ndarray, batch: list[float]) -> Tensor:
        return to_torch(np.array([protocol.running(o, b, 1 - 0.1, 0.1) for o, b in zip(old, batch, strict=True)]))

    results = []
    for part, shape, y, mask, mine in zip(flat, shapes, outputs, masks, own, strict=True):
        dx, dresidual = protocol.apply_backward(part[0], part[1], back, statistics, dtype, gamma, mask)
        parameters = np.array(protocol.parameter_gradients(mine, statistics)).T
        results.append(
            {
                "y": to_torch(y.reshape(shape), dtype),
                "dx": to_torch(dx.reshape(shape), dtype),
                **({"dresidual": to_torch(dresidual.reshape(shape), dtype)} if len(part) > 2 else {}),
                "dweight": to_torch(parameters[0]),
                "dbias": to_torch(parameters[1]),
                "running_mean": running(mean, [t.mean for t in statistics]),
                "running_var": running(var, [protocol.unbiased(t.var, packet.count) for t in statistics]),
                "num_batches_tracked": torch.tensor(1),
            }
        )
    return results


@contextmanager
def threads(number: int) -> Iterator[None]:
    """PyTorch's own thread pool at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def isa(name: str) -> Iterator[None]:
    """The core on this instruction-set path; Python's library and the operators' are one (test_torch_bytes.py proves it)."""
    before = native.isa()
    native.set_isa(name)
    try:
        yield
    finally:
        native.set_isa(before)


def theirs(shape: tuple[int, ...], **options: Any) -> nn.Module:
    classes = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    return classes[len(shape)](shape[1], **options)


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> tuple[SyncBatchNorm, nn.Module]:
    """Our layer and theirs with the same state. 16-bit inputs have float32 parameters, as under autocast."""
    options["dtype"] = torch.float64 if dtype == torch.float64 else torch.float32
    ours, reference = SyncBatchNorm(shape[1], **options), randomize(theirs(shape, **options))
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


def assert_close(ours: Any, reference: Any, tolerance: float = TOLERANCE[torch.float32]) -> None:
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)
