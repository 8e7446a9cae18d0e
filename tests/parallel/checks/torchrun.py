"""What the PyTorch layer promises over torch.distributed, checked by all ranks of one job; see test_torch_distributed.py.

Most checks compare a rank's part of a global batch with the same layer on the whole of it, in a process group of this rank
alone: equal bytes.
"""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hvd_syncbn import vectors
from hvd_syncbn.cli.stacks import torch_stack
from hvd_syncbn.torch import (
    SyncBatchNorm,
    check_ranks_agree,
    convert_sync_batchnorm,
    get_state,
    groups,
    recalibrate,
    sync_batch_norm,
    take_part,
)
from tests import torch_second as second
from tests.torch_tools import Result, assert_same, error_of, in_layout, randn, randomize, step

RANK, SIZE = dist.get_rank(), dist.get_world_size()
ALONE = [dist.new_group([rank]) for rank in range(SIZE)][RANK]  # all ranks make all groups, in this order
UNEVEN = vectors.split(SIZE, "uneven")
MINE = UNEVEN[RANK]


def gathered(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * SIZE
    dist.all_gather_object(everyone, value)
    return everyone


def network(process_set: Any = None) -> nn.Module:
    """Element-wise operations between the norms, so that all bits depend on the global batch alone."""
    model = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5), nn.Tanh())
    return randomize(convert_sync_batchnorm(model, process_set))


def batch(layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, dy = (in_layout(randn(seed, vectors.SAMPLES, 5, 7, 3, dtype=dtype), layout) for seed in (1, 2))
    return x, dy


def of_this_rank(got: Result, want: Result, mine: list[int] = MINE) -> None:
    """Outputs, input gradients and buffers have the whole batch's bytes."""
    for name, value in want.items():
        if name in ("y", "dx"):
            assert_same(got[name], value[mine], name)
        elif "running" in name or "renorm" in name or "batches" in name:
            assert_same(got[name], value, name)


def run(model: nn.Module, x: Tensor, dy: Tensor) -> Result:
    """One step: the output, the input gradient, and the model's buffers."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(dy)
    assert x.grad is not None
    buffers = {name.removeprefix("module."): buffer.clone() for name, buffer in model.named_buffers()}
    return {"y": y.detach(), "dx": x.grad, **buffers}


def assert_averages_gradients(model: nn.Module, alone: nn.Module) -> None:
    """The parameter gradients are those of one process with the whole batch, averaged over the ranks as DDP does: in floats."""
    wanted = [parameter.grad.double() / SIZE for parameter in alone.parameters() if parameter.grad is not None]
    for parameter, want in zip(model.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), want, rtol=1e-5, atol=1e-6)


# --- The same bytes ---------------------------------------------------------------------------------------------------


def check_digest() -> dict[str, str]:
    """Variant -> sha256 of the stack."""
    digests = {}
    for split in vectors.SPLITS:
        mine = vectors.split(SIZE, split)[RANK]
        for layout in ("channels_first", "channels_last"):
            y, dx, running = torch_stack(mine, layout)
            parts = gathered((mine, y, dx))
            order = np.argsort([sample for samples, _, _ in parts for sample in samples])
            whole = [np.concatenate([part[i] for part in parts])[order] for i in (1, 2)]
            digests[f"{SIZE} ranks, {split}, {layout}"] = vectors.digest(whole[0], whole[1], running)
    return digests


def check_ddp() -> None:
    """With each option that changes when gradients or buffers are exchanged."""
    options: list[dict[str, Any]] = [
        {},
        {"broadcast_buffers": False},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
    ]
    for layout in ("contiguous", "channels_last"):
        x, dy = batch(layout)
        for chosen in options:
            model = DistributedDataParallel(network(), **chosen)
            alone = network(ALONE)
            for _ in range(3):
                model.zero_grad()
                alone.zero_grad()
                of_this_rank(run(model, x[MINE], dy[MINE]), run(alone, x, dy))
            assert_averages_gradients(model, alone)


def check_batch_renormalization() -> None:
    """Alone, in DDP and FSDP, and compiled."""

    def renormalizing(process_set: Any = None) -> nn.Module:
        norms = [SyncBatchNorm(5, process_set=process_set, renorm=True, renorm_clipping={"rmax": 1.5}) for _ in range(2)]
        return randomize(convert_sync_batchnorm(nn.Sequential(norms[0], nn.ReLU(), norms[1], nn.Tanh()), process_set))

    x, dy = batch()
    sharded = renormalizing()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (SIZE,)))
    compiled = renormalizing()
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for model in (renormalizing(), DistributedDataParallel(renormalizing()), sharded, call):
        alone = renormalizing(ALONE)
        for _ in range(3):
            got = run(model, x[MINE], dy[MINE])
            got = {name.removeprefix("_orig_mod."): value for name, value in got.items()}
            of_this_rank(got, run(alone, x, dy))
            assert "0.renorm_stddev" in got
    torch._dynamo.reset()


def check_ddp_without_synchronization_of_gradients() -> None:
    """`no_sync` keeps DDP's gradients on each rank, not the statistics."""
    x, dy = batch()
    model, alone = DistributedDataParallel(network()), network(ALONE)
    with model.no_sync():
        of_this_rank(run(model, x[MINE], dy[MINE]), run(alone, x, dy))
    of_this_rank(run(model, x[MINE], dy[MINE]), run(alone, x, dy))
    assert_averages_gradients(model, alone)


def check_fsdp() -> None:
    x, dy = batch()
    model, alone = network(), network(ALONE)
    fully_shard(model, mesh=init_device_mesh("cpu", (SIZE,)))
    for _ in range(2):
        of_this_rank(run(model, x[MINE], dy[MINE]), run(alone, x, dy))


def check_fsdp_in_bfloat16() -> None:
    """A mixed precision policy casts inputs and parameters; the statistics are exact all the same."""
    x, dy = batch(dtype=torch.bfloat16)
    model, alone = network(), network(ALONE)
    fully_shard(model, mesh=init_device_mesh("cpu", (SIZE,)), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    alone = alone.to(torch.bfloat16)
    for module, original in zip(alone.modules(), network().modules(), strict=True):
        for name, buffer in original.named_buffers(recurse=False):
            setattr(module, name, buffer)  # the policy leaves buffers as they are
    of_this_rank(run(model, x[MINE], dy[MINE]), run(alone, x, dy))


def check_empty_batches() -> None:
    """The remedy for ranks with fewer batches: they go on with empty ones."""
    x, dy = batch()
    mine = list(range(vectors.SAMPLES)) if RANK == 0 else []
    of_this_rank(run(DistributedDataParallel(network()), x[mine], dy[mine]), run(network(ALONE), x, dy), mine)


def check_join() -> None:
    """DDP's `join` tells every rank that one has run out of batches, as it does for torch.nn.SyncBatchNorm.

    Without that, a joined rank would repeat DDP's collectives alone: an error in the first step, on every rank.
    """
    x, dy = batch()

    def train(model: Any, **options: Any) -> None:
        with model.join(**options):
            for _ in range(2 if RANK == 0 else 3):
                model(x[:2]).backward(dy[:2])

    if SIZE == 1:
        train(DistributedDataParallel(network()))
        return
    in_a_group = network(init_device_mesh("cpu", (SIZE,)))
    compiled = [torch.compile(module, fullgraph=True, backend="aot_eager") for module in (network(), in_a_group)]
    for module in (network(), in_a_group, *compiled):
        model = DistributedDataParallel(module)
        error = error_of(lambda model=model: train(model))  # type: ignore[misc]
        assert isinstance(error, RuntimeError) and "join(throw_on_early_termination=True)" in str(error), error
        torch._dynamo.reset()
        error = error_of(lambda model=model: train(model, throw_on_early_termination=True))  # type: ignore[misc]
        assert re.search("exhausted (all )?inputs", str(error)), error


# --- Groups of ranks --------------------------------------------------------------------------------------------------


def check_a_mesh() -> str | None:
    """Statistics over one dimension of a mesh of two."""
    if SIZE < 4:
        return "needs 4 ranks"
    mesh = init_device_mesh("cpu", (2, SIZE // 2), mesh_dim_names=("dp", "tp"))
    x, dy = batch()
    members = dist.get_process_group_ranks(mesh["dp"].get_group())
    mine = vectors.split(2, "uneven")[members.index(RANK)]
    column = mesh["tp"].get_local_rank()
    want = run(network(ALONE), x + column, dy)
    for process_set in (mesh["dp"], mesh["dp"].get_group(), mesh.get_group("dp")):
        of_this_rank(run(network(process_set), (x + column)[mine], dy[mine]), want, mine)
    assert "one dimension" in str(error_of(lambda: network(mesh)(x)))
    return None


def check_a_group() -> None:
    """A rank that is not in the group gets an error, in which the others take no part."""
    group = dist.new_group([0])
    layer, alone = (randomize(SyncBatchNorm(5, process_set=members)) for members in (group, ALONE))
    x, dy = batch()
    if RANK == 0:
        assert_same(step(layer, x, dy), step(alone, x, dy))
    else:
        assert isinstance(error_of(lambda: layer(x)), ValueError)


def check_groups() -> str | None:
    if SIZE < 4:
        return "needs 4 ranks"
    mine, everyone = groups(2)
    assert len(everyone) == SIZE // 2 and dist.get_process_group_ranks(mine) == [RANK // 2 * 2, RANK // 2 * 2 + 1]
    x, dy = batch()
    part = vectors.split(2, "even")[RANK % 2]
    of_this_rank(run(network(mine), (x + RANK // 2)[part], dy[part]), run(network(ALONE), x + RANK // 2, dy), part)
    assert groups(SIZE).mine is dist.group.WORLD
    return None


def check_conversion_as_torch_nn_has_it() -> None:
    """The name and the place of `process_group`, and a layer of `torch.nn.SyncBatchNorm` from a checkpoint."""
    model = nn.Sequential(nn.SyncBatchNorm(5), nn.BatchNorm2d(5))
    x, dy = batch()
    want = run(network(ALONE)[:1], x, dy)
    for converted in (
        SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model), dist.group.WORLD),
        SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model), process_group=dist.group.WORLD),
    ):
        assert [type(layer) for layer in converted.modules()].count(nn.SyncBatchNorm) == 0
        layer = randomize(converted)[:1]
        of_this_rank(run(layer, x[MINE], dy[MINE]), want)
    layer = SyncBatchNorm(5, 1e-5, 0.1, True, True, init_device_mesh("cpu", (SIZE,)))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(other(x[MINE]), layer(x[MINE]))


def check_a_function() -> None:
    x, _ = batch()
    running = torch.zeros(5), torch.ones(5)
    y = sync_batch_norm(x[MINE], *running, process_set=dist.group.WORLD)
    assert_same(y, sync_batch_norm(x, torch.zeros(5), torch.ones(5), process_set=ALONE)[MINE])


# --- torch.compile ----------------------------------------------------------------------------------------------------


def check_losses_with_gradients_in_them() -> None:
    """Gradient penalty, forces and curvature."""

    def add(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    for loss in second.LOSSES:
        second.check(loss, SyncBatchNorm, MINE, vectors.SAMPLES, add)


def check_compiled() -> None:
    """In one graph, with the collective that the compiler knows, and nothing that keeps CUDA graphs out."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    targets: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def compiler(graph: Any, inputs: Any) -> Any:
            targets.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=compiler)(graph, inputs)

    x, dy = batch()
    want = run(network(ALONE), x, dy)
    for process_set in (None, dist.group.WORLD, init_device_mesh("cpu", (SIZE,))):
        targets.clear()
        torch._dynamo.reset()
        model = torch.compile(network(process_set), fullgraph=True, backend=backend)
        got = run(model, x[MINE], dy[MINE])
        of_this_rank({name.removeprefix("_orig_mod."): value for name, value in got.items()}, want)
        for graph in targets:  # forward and backward, of two layers
            assert [str(target) for target in graph].count("_c10d_functional.all_reduce.default") == 2, graph
            assert not any(torch.Tag.cudagraph_unsafe in getattr(target, "tags", ()) for target in graph)
        assert len(targets) == 2


def check_one_rank_leaves_the_compiled_program() -> None:
    """As at the limit of recompilations: the ranks still exchange the same packets."""
    x, dy = batch()
    model, alone = network(), network(ALONE)
    for name, layer in model.named_children():
        layer.collective_name = f"left.{name}"  # not used in eager code before
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for chosen in (compiled, model if RANK == 0 else compiled):
        got = run(chosen, x[MINE], dy[MINE])
        of_this_rank({name.removeprefix("_orig_mod."): value for name, value in got.items()}, run(alone, x, dy))


# --- The rest of the package ------------------------------------------------------------------------------------------


def check_recalibrate() -> None:
    x, _ = batch()
    model = recalibrate(network(), [x[MINE]], progress=False)
    want = recalibrate(network(ALONE), [x], process_set=ALONE, progress=False)
    for got, wanted in zip((model[0], model[2]), (want[0], want[2]), strict=True):
        assert get_state(got).mean.tobytes() == get_state(wanted).mean.tobytes()
        assert get_state(got).variance.tobytes() == get_state(wanted).variance.tobytes()


def check_ranks_that_agree_and_differ() -> None:
    model = network()
    check_ranks_agree(model)
    with torch.no_grad():
        model[0].weight.add_(RANK)
    if SIZE > 1:
        assert "weight '0.weight'" in str(error_of(lambda: check_ranks_agree(model)))
    check_ranks_agree(model, process_set=ALONE)


def check_take_part() -> None:
    """A rank without input for the head, another one in each step, inside of DistributedDataParallel."""

    class Detector(nn.Module):
        def __init__(self, process_set: Any) -> None:
            super().__init__()
            self.trunk = nn.BatchNorm1d(5)
            self.head = nn.Sequential(nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5))
            randomize(convert_sync_batchnorm(self, process_set))

        def forward(self, x: Tensor, boxes: list[int]) -> Tensor:
            found = self.trunk(x)
            return found.sin().sum() + (self.head(found[boxes]).square().sum() if len(boxes) else take_part(self.head))

    ours, whole = Detector(None), Detector(ALONE)
    parallel = DistributedDataParallel(ours)
    for number in range(SIZE + 1):
        x = randn(number, vectors.SAMPLES, 5)
        boxes = [sample for rank in range(SIZE) for sample in UNEVEN[rank] if rank != number % SIZE or SIZE == 1]
        whole(x, boxes)
        parallel(x[MINE], [MINE.index(sample) for sample in boxes if sample in MINE]).backward()
        assert_same(dict(ours.named_buffers()), dict(whole.named_buffers()))
        gradients = torch.cat([p.grad.flatten() for p in ours.parameters() if p.grad is not None])
        assert len(gradients) == 30
        assert all(same.equal(gradients) for same in gathered(gradients))
