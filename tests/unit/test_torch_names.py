"""The names of PyTorch layers' collectives: different for different models, the same on every rank."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hvd_syncbn import horovod
from hvd_syncbn.torch import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm


class Generator(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.Conv2d(width, 2 * width, 1))
        self.last = nn.BatchNorm2d(2 * width)


class Discriminator(Generator):
    pass


NAMES = ["Generator.main.1", "Generator.last"]


def names(model: nn.Module) -> list[str]:
    return [layer.collective_name for layer in model.modules() if isinstance(layer, SyncBatchNorm)]


def test_models_that_are_converted_one_by_one() -> None:
    generator, discriminator = convert_sync_batchnorm(Generator(4)), convert_sync_batchnorm(Discriminator(8))
    assert names(generator) == NAMES
    assert names(discriminator) == ["Discriminator.main.1", "Discriminator.last"]


def test_models_of_one_class() -> None:
    """Are told apart where they are converted together."""
    models = nn.ModuleDict({"a": Generator(4), "b": Generator(8)})
    assert names(convert_sync_batchnorm(models)) == [f"ModuleDict.{key}.{path}" for key in "ab" for path in ("main.1", "last")]


@pytest.mark.parametrize(
    "way",
    [
        convert_sync_batchnorm,
        lambda model: convert_sync_batchnorm(convert_sync_batchnorm(model)),
        lambda model: convert_sync_batchnorm(revert_sync_batchnorm(convert_sync_batchnorm(model))),
        lambda model: copy.deepcopy(convert_sync_batchnorm(model)),
        lambda model: pickle.loads(pickle.dumps(convert_sync_batchnorm(model))),
        lambda model: convert_sync_batchnorm(pickle.loads(pickle.dumps(convert_sync_batchnorm(model)))),
        lambda model: convert_sync_batchnorm(torch.compile(model)),
    ],
    ids=["once", "twice", "after revert", "deepcopy", "pickle", "pickle, converted again", "compiled"],
)
def test_a_function_of_the_model_alone(way: Callable[[nn.Module], nn.Module]) -> None:
    """Whatever else this process has made: a rank that loads a file, or joins an elastic job, agrees with the others."""
    convert_sync_batchnorm(Generator())
    assert names(way(Generator())) == NAMES


def test_the_width_is_not_in_it() -> None:
    """Ranks that disagree about the number of channels have to meet, to raise an error."""
    assert names(convert_sync_batchnorm(Generator(4))) == names(convert_sync_batchnorm(Generator(8)))


def test_a_compiled_layer() -> None:
    layer = nn.BatchNorm2d(3)
    convert_sync_batchnorm(torch.compile(layer))
    assert names(layer) == ["BatchNorm2d"]


def test_a_name_with_two_sizes_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, for its forward collective, in one process set."""
    monkeypatch.setattr(horovod, "_packet_sizes", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            horovod.warn_if_sizes_differ("hvd_syncbn.a.forward", 0, 55)
            horovod.warn_if_sizes_differ("hvd_syncbn.a.forward", 1, 89)
            horovod.warn_if_sizes_differ("hvd_syncbn.b.forward", 0, 89)
            horovod.warn_if_sizes_differ("hvd_syncbn.forward.backward", 0, 55)
            horovod.warn_if_sizes_differ("hvd_syncbn.forward.backward", 0, 89)
    with pytest.warns(UserWarning, match=r"'hvd_syncbn\.a\.forward'.*Received: packets of 55 and 89 integers") as caught:
        for words in (89, 55, 89, 123):
            horovod.warn_if_sizes_differ("hvd_syncbn.a.forward", 0, words)
    assert len(caught) == 1
