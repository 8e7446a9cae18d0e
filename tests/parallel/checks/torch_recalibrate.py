"""`recalibrate` in PyTorch on 1, 2 and 3 ranks; see test_recalibrate.py."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn

from hvd_syncbn.torch import SyncBatchNorm, recalibrate
from tests import recalibration
from tests.torch_tools import LAYOUTS, in_layout, randn


class Stack(nn.Module):
    """The stack of tests/recalibration.py."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(recalibration.LAYERS):
            layer = SyncBatchNorm(
                recalibration.CHANNELS, recalibration.EPS, activation="relu" if recalibration.RELU[i] else None
            )
            tensors = layer.weight, layer.bias, layer.running_mean, layer.running_var
            with torch.no_grad():
                for tensor, values in zip(tensors, recalibration.state(i), strict=True):
                    tensor.copy_(torch.from_numpy(values))
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for layer, source in zip(self.layers, recalibration.RESIDUAL_OF, strict=True):
            outputs.append(layer(outputs[-1] if outputs else x, None if source is None else outputs[source]))
        return outputs[-1]


def check_digests() -> dict[str, str]:
    """Variant -> sha256 of all layers' statistics."""
    images = torch.from_numpy(recalibration.images())
    found = {}
    for kind in recalibration.SPLITS:
        for layout in LAYOUTS:
            for way, (options, deal) in recalibration.WAYS.items():
                mine = [in_layout(images[part], layout) for part in deal(hvd.size(), kind)[hvd.rank()]]
                model = Stack()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "the statistics of layer")
                    recalibrate(model, mine, **options)
                statistics = [(layer.running_mean.numpy(), layer.running_var.numpy()) for layer in model.layers]
                found[f"{way}, {kind}, {layout}"] = recalibration.digest(statistics)
    return found


def check_errors() -> None:
    """One rank goes wrong: every rank gets an error, soon, and keeps its model. Then all go on."""
    x = randn(hvd.rank(), 6, 5, 4)
    last = hvd.size() - 1

    class Broken(Exception):
        pass

    def breaks(data: list[Tensor]) -> Iterator[Tensor]:
        yield from data
        raise Broken("the file is damaged")

    def bad_forward(model: Any, batch: Tensor) -> None:
        model.layers[1](model.layers[0](batch))
        if hvd.rank() == last:
            raise Broken("out of memory")

    here = hvd.rank() == last
    wrong: list[tuple[str, type[Exception], dict[str, Any]]] = []
    for estimator in ("pooled", "batches"):
        data = {"batches": breaks([x]) if here else [x] * 4, "estimator": estimator}
        wrong.append(("the file is damaged", Broken, data))
        wrong.append(("out of memory", Broken, {"batches": [x] * 2, "forward": bad_forward, "estimator": estimator}))
        wrong.append(
            ("no batch|an input of 5 channels", ValueError, {"batches": [x[:, :3]] if here else [x, x], "estimator": estimator})
        )
    wrong.append(("expected estimator to be", ValueError, {"batches": [x], "estimator": "mean" if here else "pooled"}))
    wrong.append(("expected batches to be", TypeError, {"batches": x if here else [x]}))
    for text, kind, options in wrong:
        model = Stack()
        before = [tensor.clone() for tensor in model.state_dict().values()]
        try:
            recalibrate(model, **options)
        except Exception as error:
            assert isinstance(error, kind if here else RuntimeError), (text, error)
            assert any(part in str(error) for part in text.split("|")), error
            if not here:
                assert f"rank {last}" in str(error), error
        else:
            raise AssertionError(f"no error: {text}")
        assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    # Nobody has a batch, and one value in all.
    for data, text in (([], "no rank has a batch"), ([x[:1, :, 0]] if here else [], "more than 1 value")):
        for estimator in ("pooled", "batches"):
            with pytest.raises(ValueError, match=re.escape(text)):
                recalibrate(Stack(), data, estimator=estimator)
    recalibrate(Stack(), [x], estimator="batches")


def check_disagreements() -> None:
    """Models or arguments that differ between ranks, and layers that are used in another order."""
    if hvd.size() == 1:
        return
    x = randn(hvd.rank(), 6, 5, 4)
    odd = hvd.rank() == hvd.size() - 1

    def order(model: Any, batch: Tensor) -> None:
        for layer in reversed(model.layers) if odd else model.layers:
            layer(batch)

    for options, text in (
        ({"model": nn.Sequential(SyncBatchNorm(5, eps=1e-3 if odd else 1e-5))}, "the ranks disagree"),
        ({"model": nn.Sequential(*(SyncBatchNorm(5) for _ in range(1 + odd)))}, "1 and 2 layers"),
        ({"model": Stack(), "init_affine": odd}, "the ranks disagree"),
        ({"model": Stack(), "forward": order, "estimator": "batches"}, "the same layers in the same order"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            recalibrate(batches=[x], **options)


def check_process_sets() -> None:
    """Ranks share their data within a process set alone; there, too, a rank may have no batch."""
    if hvd.size() < 3:
        return
    groups = [[0, 2], [1]]
    sets = [hvd.add_process_set(group) for group in groups]
    number = int(hvd.rank() == 1)
    images = torch.from_numpy(recalibration.images()) + number
    for estimator in ("pooled", "batches"):
        model = Stack()
        mine = images.split(recalibration.GLOBAL_BATCHES) if hvd.rank() else []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the statistics of layer")
            recalibrate(model, mine, estimator=estimator, process_set=sets[number])
        found = recalibration.digest([(layer.running_mean.numpy(), layer.running_var.numpy()) for layer in model.layers])
        everyone = hvd.allgather_object(found)
        assert everyone[0] == everyone[2] != everyone[1]
        assert number or found == recalibration.digest(recalibration.reference(estimator))


def check_the_default_ignores_what_was_stored() -> None:
    """NaN after an overflow, on one rank alone: one call ends with the reference's bytes on all."""
    model = Stack()
    if hvd.rank() == 0:
        for layer in model.layers:
            layer.running_mean[0] = layer.running_var[1] = float("nan")
    images = torch.from_numpy(recalibration.images())
    mine = [images[part] for part in recalibration.batches_shards(hvd.size(), "uneven")[hvd.rank()]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        recalibrate(model, iter(mine))
    found = recalibration.digest([(layer.running_mean.numpy(), layer.running_var.numpy()) for layer in model.layers])
    assert found == recalibration.digest(recalibration.reference("batches"))
