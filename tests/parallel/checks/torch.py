"""What the PyTorch layer promises, checked by all ranks of one job together (see job.py and test_torch.py).

Most hold a rank's part of a global batch against the same layer on the whole of it, in a process set of this rank alone, where
nothing is sent: equal bytes. check_digest ties that to what other numbers of ranks get. A check that has nothing to show on
this many ranks returns why.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import horovod.torch as hvd
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_syncbn import native, protocol, vectors
from hvd_syncbn.cli.stacks import torch_stack
from hvd_syncbn.torch import SyncBatchNorm, convert_sync_batchnorm, freeze_batchnorm, sync_batch_norm
from tests.torch_tools import (
    DTYPES,
    LAYOUTS,
    Result,
    assert_same,
    error_of,
    in_layout,
    isa,
    randn,
    randomize,
    reference_step,
    step,
    threads,
    to_torch,
)

RANK, SIZE = hvd.rank(), hvd.size()
# Adding process sets is a collective of its own: all ranks add all of them, in this order.
SINGLE = [hvd.add_process_set([rank]) for rank in range(SIZE)] if SIZE > 1 else [None]
ALONE = SINGLE[RANK]
UNEVEN = vectors.split(SIZE, "uneven")
SAMPLES = vectors.SAMPLES
NEEDS = "needs {} ranks"
OPERATIONS = ("ALLREDUCE", "ALLGATHER", "BROADCAST", "ALLTOALL", "REDUCESCATTER")  # as a timeline calls them


def layer_in(process_set: Any, channels: int = 5, activation: str | None = "relu", **options: Any) -> SyncBatchNorm:
    """The same layer every time, but for whom it talks to; named as on every other rank."""
    layer = randomize(SyncBatchNorm(channels, activation=activation, process_set=process_set, **options))
    layer.collective_name = "layer"
    return layer


def batch(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Tensor]:
    """The global `(x, dy, residual)`."""
    return [in_layout(randn(seed, SAMPLES, *shape, dtype=dtype), layout) for seed in (1, 2, 3)]


def assert_part(got: Result, want: Result, mine: Sequence[int]) -> None:
    """This rank's results are its part of those of the whole batch; parameter gradients are its share."""
    for name in want:
        if name not in ("dweight", "dbias"):
            assert_same(got[name], want[name][mine] if name in ("y", "dx", "dresidual") else want[name], name)


def assert_gradients_add_up(got: Result, want: Result, process_set: Any = None) -> None:
    """Every share is rounded once, and so is the whole: that much they may differ."""
    options = {} if process_set is None else {"process_set": process_set}
    for name in ("dweight", "dbias"):
        share = got[name].double()
        total, magnitude = (hvd.allreduce(v, op=hvd.Sum, name=f"sum {name}", **options) for v in (share, share.abs()))
        bound = torch.finfo(want[name].dtype).eps * (magnitude + want[name].double().abs())
        assert ((total - want[name].double()).abs() <= bound).all(), name


# --- The same bytes ---------------------------------------------------------------------------------------------------


def check_digest() -> dict[str, str]:
    """Variant -> sha256 of the stack; test_torch.py compares them over all numbers of ranks."""
    digests = {}
    for split in vectors.SPLITS:
        mine = vectors.split(SIZE, split)[RANK]
        for layout in LAYOUTS:
            for number in (1, 2):
                for path in native.isas():
                    with threads(number), isa(path):
                        y, dx, running = torch_stack(mine, layout)
                    parts = hvd.allgather_object((mine, y, dx))
                    order = np.argsort([sample for samples, _, _ in parts for sample in samples])
                    y_all, dx_all = (np.concatenate([part[i] for part in parts])[order] for i in (1, 2))
                    assert y_all.shape == dx_all.shape == vectors.inputs()[0].shape
                    variant = f"{SIZE} ranks, {split}, {layout}, {number} threads, {path}"
                    digests[variant] = vectors.digest(y_all, dx_all, running)
    return digests


def check_types_and_layouts() -> None:
    mine = UNEVEN[RANK]
    for name, dtype in DTYPES.items():
        options = {"dtype": torch.float64} if name == "float64" else {}
        for layout in LAYOUTS:
            tensors = batch(5, 7, 3, dtype=dtype, layout=layout)
            got = step(layer_in(None, **options), *(tensor[mine] for tensor in tensors))
            want = step(layer_in(ALONE, **options), *tensors)
            assert_part(got, want, mine)
            assert_gradients_add_up(got, want)


def check_threads_and_layouts_differ_between_ranks() -> None:
    """On tensors of several tasks per rank (800 KiB in all; a task has 64)."""
    tensors, mine = batch(19, 30, 31), UNEVEN[RANK]
    with threads(1), isa("baseline"):
        want = step(layer_in(ALONE, 19), *tensors)
    with threads(1 + RANK % 2), isa(native.isas()[RANK % len(native.isas())]):
        got = step(layer_in(None, 19), *(in_layout(tensor[mine], LAYOUTS[RANK // 2 % 2]) for tensor in tensors))
    assert_part(got, want, mine)


def check_spatial_sizes() -> None:
    """Every rank has images of its own size: against the pure-Python reference."""
    rng = np.random.default_rng(5)
    parts = [rng.standard_normal((3, 1 + rank, 5, 2 + rank, 3)).astype(np.float32).astype(np.float64) for rank in range(SIZE)]
    layer = layer_in(None)
    want = reference_step(parts, layer, "float32")[RANK]
    assert_same(step(layer, *(to_torch(values) for values in parts[RANK])), want)


def check_options() -> None:
    """Without parameters, statistics, activation or residual; the average of batches; frozen."""
    mine = UNEVEN[RANK]
    for options in (
        {"affine": False},
        {"track_running_stats": False},
        {"activation": None},
        {"momentum": None},
        {"eps": 0.5, "momentum": 0.7},
    ):
        layers = layer_in(None, **options), layer_in(ALONE, **options)
        for seed in range(3):
            x, dy = randn(seed, SAMPLES, 5, 4), randn(seed + 5, SAMPLES, 5, 4)
            got, want = step(layers[0], x[mine], dy[mine]), step(layers[1], x, dy)
            assert_part(got, want, mine)
    assert_same(step(layers[0].eval(), x[mine], dy[mine])["y"], step(layers[1].eval(), x, dy)["y"][mine])


# --- Uneven jobs ------------------------------------------------------------------------------------------------------


def check_empty_rank() -> None:
    mine = vectors.split(SIZE, "empty")[RANK]
    tensors = batch(5, 4)
    got, want = step(layer_in(None), *(tensor[mine] for tensor in tensors)), step(layer_in(ALONE), *tensors)
    assert_part(got, want, mine)
    assert_gradients_add_up(got, want)
    if not mine:
        assert got["y"].shape == got["dx"].shape == (0, 5, 4)
        assert_same([got["dweight"], got["dbias"]], [torch.zeros(5)] * 2)


def check_all_ranks_empty() -> None:
    layer = layer_in(None)
    before = {name: value.clone() for name, value in layer.state_dict().items() if name.startswith("running")}
    shape = (0, 5, 4) if RANK % 2 else (3, 5, 0)
    got = step(layer, *[torch.empty(shape)] * 3)
    assert got["y"].shape == got["dx"].shape == got["dresidual"].shape == shape
    assert_same([got["dweight"], got["dbias"]], [torch.zeros(5)] * 2)
    assert_same({name: got[name] for name in before}, before)


def check_join() -> None:
    """Ranks run out of batches one after the other; those that still have some go on without them."""
    batches = [3 if rank == 0 else 1 + rank % 2 for rank in range(SIZE)]
    layer, whole = layer_in(None), layer_in(ALONE)
    for i in range(batches[RANK]):
        tensors = [randn(10 * i + j, SAMPLES, 5, 4) for j in range(3)]
        here = [rank for rank in range(SIZE) if batches[rank] > i]
        # Joined ranks' samples are in nobody's batch.
        present = [sample for rank in here for sample in UNEVEN[rank]]
        position = [present.index(sample) for sample in UNEVEN[RANK]]
        got = step(layer, *(tensor[UNEVEN[RANK]] for tensor in tensors))
        assert_part(got, step(whole, *(tensor[present] for tensor in tensors)), position)
    hvd.join()
    # Nothing is left of it.
    tensors = batch(5, 4)
    got = step(layer_in(None), *(tensor[UNEVEN[RANK]] for tensor in tensors))
    assert_part(got, step(layer_in(ALONE), *tensors), UNEVEN[RANK])


def check_process_sets() -> str | None:
    """Two groups train at a time, each on a batch of its own."""
    if SIZE < 3:
        return NEEDS.format(3)
    groups = {3: [[0, 2], [1]], 4: [[0, 2], [1, 3]]}[SIZE]
    sets = [hvd.add_process_set(group) if len(group) > 1 else SINGLE[group[0]] for group in groups]
    (number,) = [i for i, group in enumerate(groups) if RANK in group]
    mine = vectors.split(len(groups[number]), "uneven")[groups[number].index(RANK)]
    tensors = [tensor + number for tensor in batch(5, 4)]
    got, want = step(layer_in(sets[number]), *(t[mine] for t in tensors)), step(layer_in(ALONE), *tensors)
    assert_part(got, want, mine)
    assert_gradients_add_up(got, want, sets[number])
    converted = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(5)), process_set=sets[number])
    reference = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(5)), process_set=ALONE)
    assert_same(converted(tensors[0][mine]), reference(tensors[0])[mine])
    return None


def check_outside_its_process_set() -> str | None:
    """Told before anything is sent; the ranks inside do not notice."""
    if SIZE == 1:
        return NEEDS.format(2)
    layer = layer_in(SINGLE[0])
    before = copy.deepcopy(layer.state_dict())
    x = randn(1, 4, 5)
    if RANK == 0:
        assert_same(layer(x), layer_in(ALONE)(x))
    else:
        error = error_of(lambda: layer(x))
        assert type(error) is ValueError
        assert f"rank {RANK} " in str(error) and "process set" in str(error) and "ranks=[0]" in str(error)
        assert_same(dict(layer.state_dict()), dict(before))
        layer.eval()(x)
    return None


# --- Bad input --------------------------------------------------------------------------------------------------------


def check_ranks_disagree() -> str | None:
    """One rank is built otherwise: everybody is told within 10 s, by the layer's name, and goes on after."""
    if SIZE == 1:
        return NEEDS.format(2)
    odd = RANK == SIZE - 1
    name = "backbone.layer1.0.bn2"
    good = randn(1, SAMPLES, 5, 4)

    def assert_works() -> None:
        y = sync_batch_norm(good[UNEVEN[RANK]], None, None, name=name)
        assert_same(y, sync_batch_norm(good, None, None, process_set=ALONE)[UNEVEN[RANK]])

    real = hvd.allreduce_async_

    def of_another_version(packet: Tensor, **options: Any) -> int:
        with mock.patch.object(protocol, "PROTOCOL_VERSION", protocol.PROTOCOL_VERSION + 1):
            digest = protocol.forward_digest(1e-5, "float32", 5)
            packet[2:4] = torch.tensor(protocol.empty_packet(5, digest).words()[2:4])
        return real(packet, **options)

    cases: dict[str, tuple[Tensor, float]] = {
        "version": (randn(1, 4, 5, 4), 1e-5),
        "channels": (randn(1, 4, 6 if odd else 5, 4), 1e-5),
        "eps": (randn(1, 4, 5, 4), 1e-3 if odd else 1e-5),
        "dtype": (randn(1, 4, 5, 4, dtype=torch.float16 if odd else torch.bfloat16), 1e-5),
        "eps on an empty rank": (randn(1, 0 if odd else 4, 5, 4), 1e-3 if odd else 1e-5),
    }
    assert_works()
    for case, (x, eps) in cases.items():
        running = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
        start = time.monotonic()
        allreduce = of_another_version if case == "version" and odd else real
        with mock.patch.object(hvd, "allreduce_async_", allreduce):
            error = error_of(lambda x=x, running=running, eps=eps: sync_batch_norm(x, *running, eps=eps, name=name))
        assert time.monotonic() - start < 10, case
        assert type(error) is ValueError, (case, repr(error))
        assert "the ranks disagree" in str(error) and name in str(error), (case, str(error))
        assert_same(running, [torch.zeros(x.shape[1]), torch.ones(x.shape[1])])
        assert_works()
    return None


def check_one_value_per_channel() -> None:
    """In the global batch: one rank has it, the others nothing, and all are told."""
    layer = layer_in(None)
    before = copy.deepcopy(layer.state_dict())
    error = error_of(lambda: layer(torch.ones(1 if RANK == SIZE - 1 else 0, 5)))
    assert type(error) is ValueError
    assert "more than 1 value per channel" in str(error) and "'layer'" in str(error)
    assert_same(dict(layer.state_dict()), dict(before))
    # One value on each of several ranks is a batch.
    if SIZE > 1:
        x = randn(1, SIZE, 5)
        assert_same(layer_in(None)(x[RANK : RANK + 1]), layer_in(ALONE)(x)[RANK : RANK + 1])


def check_nonfinite() -> None:
    """What one rank has is NaN in that channel everywhere, and leaves no trace in the others."""
    mine = UNEVEN[RANK]
    rest = [0, 1, 3, 4]
    for value in (torch.nan, torch.inf):
        x, dy, residual = batch(5, 4)
        good = step(layer_in(ALONE), x, dy, residual)
        x[UNEVEN[SIZE - 1][0], 2, 3] = value
        got = step(layer_in(None), x[mine], dy[mine], residual[mine])
        assert_part(got, step(layer_in(ALONE), x, dy, residual), mine)
        for name in ("y", "dx"):
            assert got[name][:, 2].isnan().all()
            assert_same(got[name][:, rest], good[name][mine][:, rest])
        for name in ("running_mean", "running_var"):
            assert_same(got[name][2], layer_in(ALONE).get_buffer(name)[2])
            assert_same(got[name][rest], good[name][rest])
        whole, part = layer_in(ALONE, skip_nonfinite=False), layer_in(None, skip_nonfinite=False)
        whole(x), part(x[mine])
        for name in ("running_mean", "running_var"):
            assert_same(part.get_buffer(name), whole.get_buffer(name))
            assert part.get_buffer(name).isnan().tolist() == [False, False, True, False, False]
        # So that a loss scaler on any rank sees it.
        assert got["dweight"][2].isnan() and got["dweight"][rest].isfinite().all()

    x, dy, residual = batch(5, 4)
    good = step(layer_in(ALONE, activation=None), x, dy)
    dy[UNEVEN[SIZE - 1][0], 2, 3] = torch.inf
    got = step(layer_in(None, activation=None), x[mine], dy[mine])
    assert_same(got["y"], good["y"][mine])
    assert got["dx"][:, 2].isnan().all()
    assert_same(got["dx"][:, rest], good["dx"][mine][:, rest])


# --- In training ------------------------------------------------------------------------------------------------------


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 5), nn.BatchNorm1d(5),
    ).to(dtype)  # fmt: skip


def train(model: nn.Module, optimizer: Any, mine: list[int]) -> nn.Module:
    for i in range(6):
        x, target = randn(i, SAMPLES, 2, 6, 6, dtype=torch.float64), torch.arange(SAMPLES) % 5
        optimizer.zero_grad()
        F.cross_entropy(model(x[mine]), target[mine]).backward()
        optimizer.step()
    return model


def check_training_equals_one_process() -> None:
    """With Horovod's optimizer, against PyTorch's batch norm on the global batch.

    In float64 only the order of sums differs, by 1e-16 of a gradient, of which 6 steps make about 1e-15; running statistics
    differ by their weights, which are float32 here.
    """
    mine = vectors.split(SIZE, "even")[RANK]  # equal parts, as Horovod averages gradients without weights

    def distributed(model: nn.Module) -> nn.Module:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        return train(model, optimizer, mine)

    whole = network(torch.float64)
    train(whole, torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9), list(range(SAMPLES)))
    ours = distributed(convert_sync_batchnorm(network(torch.float64)))
    assert sum(isinstance(module, SyncBatchNorm) for module in ours.modules()) == 3
    for name, value in whole.state_dict().items():
        tolerance = 1e-6 if "running" in name else 1e-12
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=tolerance, atol=tolerance)
    if SIZE > 1:  # and without synchronization it is another training
        plain = distributed(network(torch.float64))
        assert (plain[0].weight - whole[0].weight).abs().max() > 1e-2


def check_frozen_layers_are_local() -> None:
    """Rank 0 trains alone: a collective would wait for the others. Nor does a rank's part of a batch know the rest."""
    x, dy, residual = batch(5, 3)
    for affine in (False, True):
        layer = freeze_batchnorm(randomize(SyncBatchNorm(5, activation="relu")).train(), affine)
        if RANK == 0:
            whole = step(layer, x, dy, residual)
            part = step(layer, x[:2], dy[:2], residual[:2])
            assert_same([part[name] for name in ("y", "dx")], [whole[name][:2] for name in ("y", "dx")])
            assert ("dweight" in whole) == affine


def check_horovods_sums() -> None:
    """Of every length around the one (512 KiB in all) up to which Gloo sends a message once, as our Horovod has it: exact, in
    floats the same bits on every rank; also while several are under way."""
    edge = 2**19 // 8 // max(1, SIZE - 1)
    lengths = (1, 2, 3, 1000, edge - 1, edge, edge + 1, 2 * edge + 3)
    generator = torch.Generator().manual_seed(RANK)
    for dtype in (torch.int64, torch.float32, torch.float16):
        own = [torch.randint(-1000, 1000, (length,), generator=generator).to(dtype) for length in lengths]
        names = [f"sums.{dtype}.{length}" for length in lengths]
        waiting = [hvd.allreduce_async(v, op=hvd.Sum, name=name) for v, name in zip(own, names, strict=True)]
        found = [hvd.synchronize(handle) for handle in waiting]
        everyone = hvd.allgather_object((own, found))
        for i, got in enumerate(found):
            assert all(torch.equal(sums[i].view(torch.uint8), got.view(torch.uint8)) for _, sums in everyone), names[i]
            exact = sum(values[i].double() for values, _ in everyone)
            assert torch.is_tensor(exact)
            if dtype == torch.int64:
                assert torch.equal(got, sum(values[i] for values, _ in everyone))
            else:  # every addition rounds once
                magnitude = sum(values[i].double().abs() for values, _ in everyone)
                assert ((got.double() - exact).abs() <= SIZE * torch.finfo(dtype).eps * magnitude).all(), names[i]


def check_optimizer_state_changes_no_parameter() -> None:
    """Where a rank's optimizer has no state yet, Horovod makes one by a step; with weight decay that would be a change."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, weight_decay=0.1)
    if RANK == 0 and SIZE > 1:  # the others join
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    hvd.broadcast_optimizer_state(optimizer, 0)
    for old, new in zip(before, model.parameters(), strict=True):
        assert_same(new.detach(), old)
    momentum = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(momentum, hvd.broadcast_object(momentum, 0), strict=True))


def check_compiled() -> str | None:
    """One graph, with the collectives in it."""
    if SIZE != 2:
        return "the compiler takes its time: on 2 ranks alone"
    mine = UNEVEN[RANK]
    for x, dy, residual in ([t[:, :, :k] for t in batch(5, 4)] for k in (4, 3)):
        layer = layer_in(None)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        got = step(compiled, x[mine], dy[mine], residual[mine])
        got = {name.replace("_orig_mod.", ""): value for name, value in got.items()}
        assert_part(got, step(layer_in(ALONE), x, dy, residual), mine)
    return None


# --- PyTorch's own tools ---------------------------------------------------------------------------------------------


class Written(nn.BatchNorm2d):
    """A forward that calls the function itself, as image libraries have it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        running = self.running_mean, self.running_var
        return F.silu(F.batch_norm(x, *running, self.weight, self.bias, self.training, self.momentum, self.eps))


def blocks(momentum: float | None = 0.1, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """In float64, where the order of a sum is worth 1e-15: what one process gets from the whole batch is seen exactly."""
    torch.manual_seed(1)
    convolutions = [nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2)]
    return randomize(nn.Sequential(*(nn.Sequential(conv, norm(3, momentum=momentum)) for conv in convolutions)).double())


def assert_equals_one_process(ours: nn.Module, theirs: nn.Module, steps: int = 3) -> None:
    """Ours on this rank's part, PyTorch's batch norm on the global batch. Running statistics: by float32 weights, 1e-7."""
    mine = UNEVEN[RANK]
    for seed in range(steps):
        x, dy = (randn(10 * seed + i, SAMPLES, 3, 5, 5, dtype=torch.float64) + 5 * i for i in (1, 2))
        got, want = step(ours, x[mine], dy[mine]), step(theirs, x, dy)
        for name in want:
            if name in ("y", "dx"):
                torch.testing.assert_close(got[name], want[name][mine], rtol=1e-10, atol=1e-10)
            elif not name.endswith(("weight", "bias")):
                assert name in got
                torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)


def check_checkpointing() -> None:
    """Ranks run every block twice, and count alike: statistics and counter are PyTorch's, of the global batch."""

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Sequential, reentrant: bool) -> None:
            super().__init__()
            self.inner, self.reentrant = inner, reentrant

        def forward(self, x: Tensor) -> Tensor:
            for block in self.inner:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            return x

    for reentrant in (True, False):
        for momentum in (0.1, None):
            ours = Checkpointed(convert_sync_batchnorm(blocks(momentum)), reentrant)
            theirs = Checkpointed(blocks(momentum), reentrant)
            assert_equals_one_process(ours, theirs)
            assert [block[1].num_batches_tracked.item() for block in ours.inner] == [6, 6]


def check_in_place() -> None:
    """An optimizer and a list from before the conversion are those of the model that trains on all ranks."""
    mine = vectors.split(SIZE, "even")[RANK]  # equal parts, as Horovod averages gradients without weights
    ours, theirs = blocks(), blocks()
    listed = [layer for layer in ours.modules() if isinstance(layer, nn.BatchNorm2d)]
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=ours.named_parameters())
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1)
    assert convert_sync_batchnorm(ours) is ours
    assert len(listed) == 2 and all(isinstance(layer, SyncBatchNorm) for layer in listed)
    for seed in range(3):
        x = randn(seed, SAMPLES, 3, 5, 5, dtype=torch.float64)
        for model, by, part in ((ours, optimizer, x[mine]), (theirs, reference, x)):
            by.zero_grad()
            model(part).square().mean().backward()
            by.step()
    for name, value in theirs.state_dict().items():
        tolerance = 1e-6 if "running" in name else 1e-10
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=tolerance, atol=tolerance)


def check_function_in_their_forward() -> None:
    """F.batch_norm in somebody's forward is over all ranks, for a traced model, too."""
    assert_equals_one_process(convert_sync_batchnorm(blocks(norm=Written)), blocks(norm=Written))
    assert_equals_one_process(torch.fx.symbolic_trace(convert_sync_batchnorm(blocks(norm=Written))), blocks(norm=Written))
    if SIZE > 1:  # and it is not where nothing is converted
        error = error_of(lambda: assert_equals_one_process(blocks(norm=Written), blocks(norm=Written)))
        assert type(error) is AssertionError


def check_symbolic_trace() -> None:
    for training in (True, False):
        traced = torch.fx.symbolic_trace(convert_sync_batchnorm(blocks()).train(training)).train()
        assert_equals_one_process(traced, blocks())


def check_compiled_function_in_their_forward() -> str | None:
    if SIZE != 2:
        return "the compiler takes its time: on 2 ranks alone"
    ours = convert_sync_batchnorm(blocks(norm=Written)[:1])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    compiled.__dict__["named_buffers"] = ours.named_buffers  # without the compiler's prefix
    assert_equals_one_process(compiled, blocks(norm=Written)[:1], steps=1)
    return None


# --- What is sent -----------------------------------------------------------------------------------------------------


def collectives(run: Callable[[], Any]) -> Counter[str] | None:
    """Collectives by name that `run` causes, from Horovod's own record of them; rank 0 alone has it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timeline.json"
        hvd.start_timeline(str(path))
        hvd.allreduce(torch.zeros(1), name="first")
        run()
        hvd.allreduce(torch.zeros(1), name="last")
        hvd.stop_timeline()
        if RANK:
            return None
        deadline = time.monotonic() + 20
        while True:
            # Written by a thread of its own; its list may lack an end, and its last entry a part.
            text = path.read_text().rstrip().rstrip(",").removesuffix("]") if path.exists() else ""
            try:
                events = json.loads(text + "]")
            except json.JSONDecodeError:
                events = []
            names = {event["pid"]: event["args"]["name"] for event in events if "name" in event.get("args", {})}
            # An operation is recorded within another, GLOO_ALLREDUCE in ALLREDUCE, and after its NEGOTIATE_ALLREDUCE.
            begins = [event for event in events if event.get("ph") == "B" and event["name"] in OPERATIONS]
            counts = Counter(names[event["pid"]] for event in begins)
            if counts["allreduce.last"] or time.monotonic() > deadline:
                assert counts.pop("allreduce.first") == counts.pop("allreduce.last") == 1, text
                return counts
            time.sleep(0.05)


def check_one_collective_per_layer_and_direction() -> str | None:
    """By Horovod's timeline; named by the layer's place in the model."""
    if SIZE == 1:
        return NEEDS.format(2)
    model = nn.ModuleDict({"backbone": nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5))})
    net = convert_sync_batchnorm(model)["backbone"]
    x = randn(RANK, 4, 3, 6, 6)
    layer = layer_in(None)
    y = randn(RANK, 4, 5, 6)

    def forward_and_backward(times: int) -> None:
        for _ in range(times):
            net(x).square().sum().backward()

    def without_gradients() -> None:
        with torch.no_grad():
            net(x)

    def alone() -> None:
        step(layer_in(ALONE), y, y)

    backbone = [f"allreduce.hvd_syncbn.ModuleDict.backbone.{i}" for i in (1, 3)]
    forward, backward = ({f"{name}.{direction}": 1 for name in backbone} for direction in ("forward", "backward"))
    alone_in_model = {f"allreduce.hvd_syncbn.layer.{direction}": 1 for direction in ("forward", "backward")}
    runs: list[tuple[Callable[[], Any], dict[str, int]]] = [
        (lambda: forward_and_backward(1), forward | backward),
        (lambda: forward_and_backward(3), {name: 3 for name in forward | backward}),
        (without_gradients, forward),
        # Also where nothing but the parameters' gradients is wanted, which are this rank's own: another rank may want dx.
        (lambda: layer(y).sum().backward(), alone_in_model),
        (lambda: step(layer, y, y, y), alone_in_model),
        (alone, {}),
        (lambda: net.eval()(x).sum().backward(), {}),
    ]
    for run, want in runs:
        counts = collectives(run)
        assert counts is None or counts == want, counts
    return None
