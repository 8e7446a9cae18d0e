"""`take_part` and `accumulate_statistics` in one process: wrong arguments, warnings, what they leave alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

pytest.importorskip("horovod.torch")
pytest.importorskip("horovod.tensorflow")

import horovod.tensorflow
import horovod.torch
import keras
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_syncbn import keras as ours_keras
from hvd_syncbn import torch as ours_torch
from tests.torch_tools import assert_same, randn


@pytest.fixture(scope="module", autouse=True)
def initialized() -> None:
    horovod.torch.init()
    horovod.tensorflow.init()


@pytest.mark.parametrize("batches", [0, -1])
@pytest.mark.parametrize("ours", [ours_torch, ours_keras])
def test_too_few_batches(ours: Any, batches: int) -> None:
    with pytest.raises(ValueError, match=rf"at least 1 micro-batch per update. Received: batches={batches}"):
        ours.accumulate_statistics(nn.Linear(1, 1) if ours is ours_torch else keras.layers.Dense(1), batches)


@pytest.mark.parametrize("batches", [2.0, True, "2"])
@pytest.mark.parametrize("ours", [ours_torch, ours_keras])
def test_no_number_of_batches(ours: Any, batches: Any) -> None:
    with pytest.raises(TypeError, match="expected an int for"):
        ours.accumulate_statistics(nn.Linear(1, 1) if ours is ours_torch else keras.layers.Dense(1), batches)


def test_no_module() -> None:
    for call in (lambda: ours_torch.take_part(3), lambda: ours_torch.accumulate_statistics(3, 2)):
        with pytest.raises(TypeError, match=r"expected a torch.nn.Module. Received: int"):
            call()
    for call in (lambda: ours_keras.take_part(3), lambda: ours_keras.accumulate_statistics(3, 2)):
        with pytest.raises(TypeError, match="must be a single Keras 3 model or layer"):
            call()


def test_nothing_synchronized() -> None:
    dense = keras.layers.Dense(1)
    dense.build((None, 1))
    with pytest.warns(UserWarning, match="found no SyncBatchNorm that could take part. Received: Linear"):
        zero = ours_torch.take_part(nn.Linear(1, 1))
    zero.backward()
    with pytest.warns(UserWarning, match="found no SyncBatchNormalization that could take part"):
        assert ours_keras.take_part(dense) == 0
    with pytest.warns(UserWarning, match="found no SyncBatchNorm. Received: Linear"):
        ours_torch.accumulate_statistics(nn.Linear(1, 1), 2)
    with pytest.warns(UserWarning, match="found no SyncBatchNormalization. Received: "):
        ours_keras.accumulate_statistics(dense, 2)


def test_not_built_or_not_trainable() -> None:
    norm = ours_keras.SyncBatchNormalization(name="norm")
    for call in (lambda: ours_keras.take_part(norm), lambda: ours_keras.accumulate_statistics(norm, 2)):
        with pytest.raises(ValueError, match=r"is not built: call it on a batch first. Received: layer 'norm' without weights"):
            call()
    norm.build((None, 2))
    norm.trainable = False
    with pytest.raises(ValueError, match=r"no variable of the layers is trainable.*call them with an empty batch"):
        ours_keras.take_part(norm)


class CallsTheFunction(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)


class CallsItsBase(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)


def test_user_defined_layers() -> None:
    """One that calls F.batch_norm itself is warned of; one that calls our forward accumulates."""
    model = ours_torch.convert_sync_batchnorm(nn.Sequential(CallsTheFunction(2), CallsItsBase(2)))
    with pytest.warns(UserWarning, match=r"layer '0' updates its running statistics in every step.*CallsTheFunction"):
        ours_torch.accumulate_statistics(model, 2)
    before = copy.deepcopy(model.state_dict())
    x = randn(1, 4, 2)
    model(x)
    assert not torch.equal(model[0].running_mean, before["0.running_mean"])
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    model(x)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(duplicate: Any) -> None:
    """A copy goes on where the layer is; reverting ends it."""
    layer = ours_torch.accumulate_statistics(ours_torch.SyncBatchNorm(2), 2)
    x = randn(1, 2, 4, 2)
    layer(x[0])
    other = duplicate(layer)
    for each in (layer, other):
        each(x[1])
    assert int(other.num_batches_tracked) == 1
    assert_same(dict(other.state_dict()), dict(layer.state_dict()))
    plain = ours_torch.revert_sync_batchnorm(layer)
    plain(x[0])
    assert int(plain.num_batches_tracked) == 2
    assert not {name for name in vars(plain) if "total" in name or "batches_per" in name}


def test_the_model_in_evaluation() -> None:
    layer = ours_torch.accumulate_statistics(ours_torch.SyncBatchNorm(2), 2).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(randn(1, 4, 2))
    layer(randn(1, 4, 2))
    assert_same(dict(layer.state_dict()), dict(before))
