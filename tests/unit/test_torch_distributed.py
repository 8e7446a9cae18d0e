"""Which engine a layer uses, in one process. Jobs of several are in tests/parallel/test_torch_distributed.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import horovod.torch as hvd
import pytest
import torch
import torch.distributed as dist
from torch import nn

from hvd_syncbn.torch import SyncBatchNorm, convert_sync_batchnorm
from hvd_syncbn.torch_impl import distributed, horovod, ranks
from tests.torch_tools import assert_same, randn, randomize


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def no_horovod() -> Iterator[None]:
    hvd.shutdown()
    yield
    hvd.init()


def test_horovod_comes_first(process_group: None) -> None:
    hvd.init()
    assert isinstance(ranks.find(None), horovod.Group)
    assert isinstance(ranks.find(dist.group.WORLD), distributed.Group)


def test_torch_distributed_where_horovod_is_not_initialized(no_horovod: None, process_group: None) -> None:
    assert isinstance(ranks.find(None), distributed.Group)
    x = randn(1, 4, 3)
    assert_same(randomize(SyncBatchNorm(3))(x), randomize(SyncBatchNorm(3, process_set=dist.group.WORLD))(x))


def test_neither(no_horovod: None) -> None:
    with pytest.raises(RuntimeError, match=r"horovod\.torch\.init\(\).*torch\.distributed\.init_process_group\(\)"):
        SyncBatchNorm(3)(randn(1, 4, 3))


def test_not_a_member(process_group: None) -> None:
    layer = SyncBatchNorm(3, process_set=dist.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(ValueError, match="rank 0 is not in the process group"):
        layer(randn(1, 4, 3))


def test_a_group_that_is_gone(process_group: None) -> None:
    layer = SyncBatchNorm(3, process_set=dist.group.WORLD)
    layer(randn(1, 4, 3))
    dist.destroy_process_group()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # of another number
    layer.process_set = dist.group.WORLD
    layer(randn(1, 4, 3))


def test_a_key_in_a_new_process(process_group: None) -> None:
    """A compiled program that was loaded from a cache has only the key."""
    key = ranks.find(dist.group.WORLD).key
    ranks._groups.clear()
    assert ranks.known(key).size == 1
    hvd.init()
    assert ranks.known("horovod:0").size == 1


def test_conversion_as_torch_nn_has_it(process_group: None) -> None:
    for options in ({"process_group": dist.group.WORLD}, {"process_set": dist.group.WORLD}):
        model = SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.SyncBatchNorm(3)), **options)
        assert type(model[0]) is SyncBatchNorm and model[0].process_set is dist.group.WORLD
    assert convert_sync_batchnorm(nn.BatchNorm1d(3), dist.group.WORLD).process_set is dist.group.WORLD


def test_import_without_horovod() -> None:
    """And training over torch.distributed."""
    code = """if True:
        import sys
        sys.modules["horovod"] = None
        import torch, torch.distributed as dist
        from hvd_syncbn.torch import SyncBatchNorm
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        SyncBatchNorm(3)(torch.randn(4, 3, requires_grad=True)).sum().backward()
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_collective_in_a_graph(process_group: None, device: str) -> None:
    """A fake tensor takes the collective that compilers know."""
    from torch.fx.experimental.proxy_tensor import make_fx

    key = ranks.find(dist.group.WORLD).key
    packet = torch.zeros(4, dtype=torch.int64, device=device)
    graph = make_fx(lambda packet: torch.ops.hvd_syncbn.sum_over_distributed_(packet, "name", key), tracing_mode="fake")(packet)
    assert "_c10d_functional.all_reduce" in graph.code and "wait_tensor" in graph.code
