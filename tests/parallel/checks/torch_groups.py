"""``groups`` in PyTorch on four ranks: what it makes, and two groups that train at once."""

from __future__ import annotations

import copy
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_syncbn import vectors
from hvd_syncbn.torch import SyncBatchNorm, convert_sync_batchnorm, groups
from tests.parallel.shared.groups import check_groups_are_agreed as _agreed
from tests.parallel.shared.groups import check_groups_of_a_job as _made
from tests.torch_tools import assert_same, randn, randomize, step

RANK = hvd.rank()


def check_groups_of_a_job() -> None:
    _made(hvd, groups)


def check_groups_are_agreed() -> None:
    _agreed(hvd, groups)


def layer_in(process_set: Any) -> SyncBatchNorm:
    layer = randomize(SyncBatchNorm(5, activation="relu", process_set=process_set))
    layer.collective_name = "layer"
    return layer


def check_two_groups_train_and_evaluate() -> None:
    """Each on a batch of its own, five steps; equal bytes to one process that has the group's batch, and so in evaluation."""
    alone = groups(1).mine
    mine = groups(2).mine
    group, place = divmod(RANK, 2)
    part = vectors.split(2, "uneven")[place]
    got_layer, want_layer = layer_in(mine), layer_in(alone)
    for seed in range(5):
        x, dy = (randn(10 * seed + 2 * group + i, vectors.SAMPLES, 5, 4) for i in range(2))
        got, want = step(got_layer, x[part], dy[part]), step(want_layer, x, dy)
        for name in ("y", "dx"):
            assert_same(got[name], want[name][part])
        for name in ("running_mean", "running_var"):
            assert_same(got[name], want[name])
    assert_same(got_layer.eval()(x[part]), want_layer.eval()(x)[part])
    # Two groups, two sets of statistics: they do not know of each other.
    everyone = hvd.allgather_object(got_layer.running_mean.tolist())
    assert everyone[0] == everyone[1] != everyone[2] == everyone[3]


def check_conversion_again_changes_the_group() -> None:
    model = nn.Sequential(nn.Conv1d(2, 5, 1), nn.BatchNorm1d(5))
    model = convert_sync_batchnorm(model, process_set=groups(2).mine)
    assert model[1].process_set.ranks == [RANK // 2 * 2, RANK // 2 * 2 + 1]
    again = convert_sync_batchnorm(copy.copy(model), process_set=groups(4).mine)
    assert again[1].process_set.process_set_id == 0
    again(torch.ones(1, 2, 3) * RANK)


def check_a_set_that_is_gone() -> None:
    """After a reset its number is nobody's or another set's: an error, before anything is sent."""
    layer = layer_in(groups(2).mine)
    x = randn(RANK, 3, 5)
    layer(x)
    number = layer.process_set.process_set_id
    for process_set in groups(2).all:
        assert hvd.remove_process_set(process_set)

    def refused() -> bool:
        try:
            layer(x)
        except ValueError as error:
            return "not Horovod's any more" in str(error) and "hvd.elastic.run" in str(error)
        return False

    assert refused()
    others = [hvd.add_process_set(ranks) for ranks in ([0, 1, 2], [1, 2, 3])]
    assert number in [other.process_set_id for other in others]  # Horovod gives numbers again
    assert refused()
    layer.process_set = groups(2).mine
    layer(x)
