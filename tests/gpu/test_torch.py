"""PyTorch's operators and the layer on a GPU give the bytes that they give on the CPU.

What the CPU gives is held to the pure-Python reference in tests/unit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hvd_syncbn.torch import SyncBatchNorm, check_device_errors, freeze_batchnorm, sync_batch_norm
from hvd_syncbn.torch_impl import ops
from tests.arrays import hostile
from tests.cuda_kernels import LAG
from tests.torch_tools import DTYPES, LAYOUTS, assert_same, in_layout, randn, randomize, step, to_torch

EPS = 1e-5
SHAPES = [
    (1025, 260),  # 2-D
    (3, 5),
    (40, 3, 7),  # 3-D
    (2, 33, 2, 3, 5),  # 5-D
    (32, 70, 7, 7),
    (256, 300, 1, 1),
    (3, 17, 8, 8),
    (3, 17, 5, 13),
    (8, 64, 28, 28),
    (2, 96, 56, 56),
    (1, 3, 64, 64),
    (2, 5, 17, 241),  # one position past a piece
    (2, 33, 82, 100),
    (1, 1, 300, 301),
    (9, 8, 112, 112),
    (0, 7, 3, 3),
    (5, 7, 0),
]


def values(seed: int, shape: tuple[int, ...], dtype: str, layout: str, nonfinite: bool = False) -> Tensor:
    """Hostile values on the CPU, in a layout."""
    data = hostile(np.random.default_rng(seed), shape, dtype, nonfinite)
    return in_layout(to_torch(data, dtype), layout)


def to_gpu(tensor: Tensor | None) -> Tensor | None:
    """A copy that lies in memory as the tensor does."""
    if tensor is None:
        return None
    return torch.empty_like(tensor, device="cuda").copy_(tensor)


def to_cpu(results: Any) -> Any:
    return {name: None if tensor is None else tensor.cpu() for name, tensor in results.items()}


def operators(x: Tensor, dy: Tensor, residual: Tensor | None, vectors: list[Tensor], relu: bool) -> dict[str, Tensor]:
    """All four operators, as the layer calls them; the packets are those of two ranks that have the same samples."""
    weight, bias, mean, var = (tensor.clone() for tensor in vectors)
    forward_packet = ops.forward_moments(x, EPS)
    y, stats = ops.forward_apply(
        x, 2 * forward_packet, weight, bias, residual, mean, var, None, 0.9, 0.1, True, True, EPS, relu, "layer"
    )
    output = y if relu else None
    backward_packet, dweight, dbias = ops.backward_moments(x, dy, output, stats, weight.dtype)
    dx, dresidual = ops.backward_apply(x, dy, output, 2 * backward_packet, stats, weight, relu, "layer")
    return {
        "forward packet": forward_packet,
        "y": y,
        "stats": stats,
        "mean": mean,
        "var": var,
        "backward packet": backward_packet,
        "dweight": dweight,
        "dbias": dbias,
        "dx": dx,
        "dresidual": dresidual,
    }


def compare(shape: tuple[int, ...], dtype: str, layout: str, seed: int, *, relu: bool, add: bool, nonfinite: bool) -> None:
    x = values(seed, shape, dtype, layout, nonfinite)
    dy = values(seed + 1, shape, dtype, layout, nonfinite)
    residual = values(seed + 2, shape, dtype, layout) if add else None
    parameter = torch.float64 if dtype == "float64" else torch.float32
    vectors = [randn(seed + i, shape[1], dtype=parameter) for i in range(4)]
    want = operators(x, dy, residual, vectors, relu)
    got = operators(*(to_gpu(t) for t in (x, dy, residual)), [v.cuda() for v in vectors], relu)
    assert got["y"].stride() == want["y"].stride()
    assert_same(to_cpu(got), want, f"{shape} {dtype} {layout}")
    check_device_errors()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operators_equal_cpu(shape: tuple[int, ...], dtype: str, layout: str) -> None:
    seed = sum(shape)
    compare(shape, dtype, layout, seed, relu=seed % 2 == 0, add=seed % 3 == 0, nonfinite=seed % 5 == 0)
    compare(shape, dtype, layout, seed + 9, relu=seed % 2 == 1, add=seed % 3 != 0, nonfinite=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_steps(dtype: str) -> None:
    """Every kernel once or more: what compute-sanitizer runs."""
    for shape in ((130, 3), (3, 5, 7, 7), (9, 70, 2, 3), (2, 3, 65, 1), (2, 33, 64, 66), (300, 8, 9, 8), (0, 3, 2)):
        for layout in LAYOUTS:
            compare(shape, dtype, layout, sum(shape), relu=True, add=True, nonfinite=False)
            compare(shape, dtype, layout, sum(shape), relu=False, add=False, nonfinite=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_value(dtype: str) -> None:
    """Conversions are the device's own: all bit patterns through apply, by the statistics of other data."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype]).reshape(-1, 64)
    vectors = [randn(i, 64) for i in range(4)]

    def run(device: str) -> Tensor:
        packet = ops.forward_moments(randn(7, 100, 64, dtype=DTYPES[dtype]).to(device), EPS)
        on = [v.to(device) for v in vectors]
        return ops.forward_apply(x.to(device), packet, *on[:2], None, *on[2:], None, 0.9, 0.1, True, True, EPS, False, "layer")[
            0
        ]

    assert_same(run("cuda").cpu(), run("cpu"))


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_alignment(dtype: str, offset: int) -> None:
    shape = (4, 8, 12, 12)
    x, dy = (values(seed, shape, dtype, "contiguous") for seed in (1, 2))
    vectors = [randn(i, 8) for i in range(4)]
    shifted = []
    for tensor in (x, dy):
        memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device="cuda")
        shifted.append(memory[offset:].view(shape).copy_(tensor))
    want = operators(x, dy, None, vectors, True)
    assert_same(to_cpu(operators(*shifted, None, [v.cuda() for v in vectors], True)), want)


def test_current_stream() -> None:
    """Work that the current stream still has to do before x is there is waited for, by the stream and not by the host."""
    x, dy = randn(1, 16, 32, 40, 40), randn(2, 16, 32, 40, 40)
    vectors = [randn(i, 32) for i in range(4)]
    want = operators(x, dy, None, vectors, True)
    on_gpu = [v.cuda() for v in vectors]
    late_x, late_dy, now_x, now_dy = (
        torch.zeros_like(x, device="cuda"),
        torch.zeros_like(dy, device="cuda"),
        x.cuda(),
        dy.cuda(),
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        operators(now_x, now_dy, None, on_gpu, True)  # loads kernels and takes memory, which may wait
        stream.synchronize()
        torch.cuda._sleep(1_000_000_000)
        late_x.copy_(now_x)
        late_dy.copy_(now_dy)
        got = operators(late_x, late_dy, None, on_gpu, True)
        finished = stream.query()
    assert not finished  # still asleep: nothing synchronised
    stream.synchronize()
    assert_same(to_cpu(got), want)


def test_cuda_graph() -> None:
    x, dy = randn(1, 8, 32, 20, 20).cuda(), randn(2, 8, 32, 20, 20).cuda()
    vectors = [randn(i, 32).cuda() for i in range(4)]
    operators(x, dy, None, vectors, True)  # what is allocated once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operators(x, dy, None, vectors, True)
    for seed in (5, 6):
        new_x, new_dy = randn(seed, *x.shape), randn(seed + 10, *x.shape)
        x.copy_(new_x)
        dy.copy_(new_dy)
        graph.replay()
        assert_same(to_cpu(captured), operators(new_x, new_dy, None, [v.cpu() for v in vectors], True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer(dtype: str, layout: str) -> None:
    """The public layer with autograd, residual and activation."""
    parameter = torch.float64 if dtype == "float64" else torch.float32
    layer = randomize(SyncBatchNorm(33, activation="relu", dtype=parameter), 3)
    on_gpu = SyncBatchNorm(33, activation="relu", dtype=parameter, device="cuda")
    on_gpu.load_state_dict(layer.state_dict())
    tensors = [in_layout(randn(seed, 6, 33, 9, 7, dtype=DTYPES[dtype]), layout) for seed in range(3)]
    want = step(layer, *tensors)
    assert_same(to_cpu(step(on_gpu, *(to_gpu(t) for t in tensors))), want)


def test_amp_and_channels_last() -> None:
    """Behind a convolution under autocast the layer gets bfloat16 and has float32 parameters."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(8, 16, 3, device="cuda").to(memory_format=torch.channels_last)
    layer = randomize(SyncBatchNorm(16, activation="relu").cuda())
    x = randn(3, 4, 8, 20, 20).cuda().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        between = conv(x)
        y = layer(between)
    assert between.dtype == y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    y.float().square().mean().backward()
    assert layer.weight.grad.dtype == torch.float32 and conv.weight.grad.isfinite().all()
    twin = randomize(SyncBatchNorm(16, activation="relu"))
    assert_same(y.cpu(), twin(between.detach().cpu()))


def test_size_one_equals_two_ranks() -> None:
    """The packets of two halves add up to that of the whole, and give each half the whole's output."""
    x = randn(1, 10, 12, 9, 9).cuda()
    vectors = [randn(i, 12).cuda() for i in range(4)]

    def apply(part: Tensor, packet: Tensor) -> Tensor:
        mean, var = (v.clone() for v in vectors[2:])
        return ops.forward_apply(part, packet, *vectors[:2], None, mean, var, None, 0.9, 0.1, True, True, EPS, False, "layer")[
            0
        ]

    halves = x[:3], x[3:]
    packet = ops.forward_moments(halves[0], EPS) + ops.forward_moments(halves[1], EPS)
    whole = apply(x, ops.forward_moments(x, EPS)).cpu()
    assert_same(torch.cat([apply(half, packet) for half in halves]).cpu(), whole)


def test_wrong_packets_become_nan_and_are_raised_later() -> None:
    x = randn(1, 4, 5, 3).cuda()

    def apply(packet: Tensor, name: str) -> Tensor:
        return ops.forward_apply(x, packet, None, None, None, None, None, None, 0.9, 0.1, True, True, EPS, True, name)[0]

    packet = ops.forward_moments(x, EPS)
    disagree, one_value = packet.clone(), packet.clone()
    disagree[2] += 1
    one_value[1] = 1
    for wrong, name, message in (
        (disagree, "stem.bn", "disagree.*'stem.bn'"),
        (one_value, "head.bn", "more than 1.*'head.bn'"),
    ):
        apply(packet, "fine")
        y = apply(wrong, name)
        for _ in range(LAG - 1):  # not at once, and not when this host happens to look: at the same call on every rank
            torch.cuda.synchronize()
            apply(packet, "fine")
        with pytest.raises(ValueError, match=message):
            ops.forward_moments(x, EPS)
        assert y.isnan().all()
        check_device_errors()  # told once
        for _ in range(2 * LAG):
            apply(packet, "fine")
        apply(wrong, name)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=message):
            check_device_errors()


def test_a_wrong_packet_changes_no_running_statistic() -> None:
    x = randn(1, 4, 5, 3).cuda()
    mean, var = torch.full((5,), 3.0, device="cuda"), torch.full((5,), 4.0, device="cuda")
    packet = ops.forward_moments(x, EPS)
    packet[2] += 1
    ops.forward_apply(x, packet, None, None, None, mean, var, None, 0.9, 0.1, True, True, EPS, True, "stem.bn")
    torch.cuda.synchronize()
    assert (mean == 3).all() and (var == 4).all()
    with pytest.raises(ValueError, match="disagree"):
        check_device_errors()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_layer(layout: str, affine: bool) -> None:
    layer = freeze_batchnorm(randomize(SyncBatchNorm(33, activation="relu"), 3), affine).train()
    on_gpu = freeze_batchnorm(SyncBatchNorm(33, activation="relu").cuda(), affine).train()
    on_gpu.load_state_dict(layer.state_dict())
    tensors = [in_layout(randn(seed, 6, 33, 14, 14), layout) for seed in range(3)]
    assert_same(to_cpu(step(on_gpu, *map(to_gpu, tensors))), step(layer, *tensors))


def test_one_value_per_channel() -> None:
    layer = SyncBatchNorm(3).cuda()
    y = layer(torch.ones(1, 3, device="cuda"))
    torch.cuda.synchronize()
    assert y.isnan().all()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        check_device_errors()


def test_tensors_of_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match=r"on one device\. Received: input on cuda:0, running_mean on cpu"):
        sync_batch_norm(randn(1, 4, 3).cuda(), torch.zeros(3), torch.ones(3))


def test_several_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, dy = randn(1, 8, 32, 20, 20), randn(2, 8, 32, 20, 20)
    vectors = [randn(i, 32) for i in range(4)]
    want = operators(x, dy, None, vectors, True)
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        got = operators(x.to(device), dy.to(device), None, [v.to(device) for v in vectors], True)
        assert_same(to_cpu(got), want, device)
