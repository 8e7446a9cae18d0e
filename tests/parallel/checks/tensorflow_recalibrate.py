"""`recalibrate` in Keras on 1, 2 and 3 ranks; see test_recalibrate.py. The same checks as in checks/torch_recalibrate.py."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import pytest

from hvd_syncbn.keras import SyncBatchNormalization, recalibrate
from tests import recalibration


def norm(**options: Any) -> SyncBatchNormalization:
    return SyncBatchNormalization(**{"epsilon": recalibration.EPS, "unbiased_variance": True, **options})


def stack(layout: str = "channels_last", variables: bool = True) -> keras.Model:
    """The stack of tests/recalibration.py."""
    sizes = recalibration.CHANNELS, recalibration.HEIGHT, recalibration.WIDTH
    first = layout == "channels_first"
    inputs = keras.Input(sizes if first else (*sizes[1:], sizes[0]))
    outputs: list[Any] = []
    for i in range(recalibration.LAYERS):
        layer = norm(axis=1 if first else -1, activation="relu" if recalibration.RELU[i] else None, name=f"norm{i}")
        source = recalibration.RESIDUAL_OF[i]
        x = outputs[-1] if outputs else inputs
        outputs.append(layer(x) if source is None else layer(x, residual=outputs[source]))
        layer.set_weights(recalibration.state(i))
    return keras.Model(inputs, outputs[-1])


def norms(model: keras.Model) -> list[Any]:
    return [layer for layer in model.layers if isinstance(layer, SyncBatchNormalization)]


def statistics(model: keras.Model) -> list[tuple[Any, Any]]:
    return [(layer.moving_mean.numpy(), layer.moving_variance.numpy()) for layer in norms(model)]


def images(layout: str = "channels_last") -> np.ndarray:
    return recalibration.images() if layout == "channels_first" else np.moveaxis(recalibration.images(), 1, -1)


def check_digests() -> dict[str, str]:
    """Variant -> sha256 of all layers' statistics."""
    found = {}
    for kind in recalibration.SPLITS:
        for layout in ("channels_first", "channels_last"):
            for way, (options, deal) in recalibration.WAYS.items():
                mine = [images(layout)[part] for part in deal(hvd.size(), kind)[hvd.rank()]]
                model = stack(layout)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "the statistics of layer")
                    recalibrate(model, mine, **options)
                found[f"{way}, {kind}, {layout}"] = recalibration.digest(statistics(model))
    return found


def check_errors() -> None:
    """One rank goes wrong: every rank gets an error, soon, and keeps its model. Then all go on."""
    x = images()[:6]
    last = hvd.size() - 1
    here = hvd.rank() == last

    class Broken(Exception):
        pass

    def breaks(data: list[np.ndarray]) -> Iterator[np.ndarray]:
        yield from data
        raise Broken("the file is damaged")

    def bad_forward(model: Any, batch: np.ndarray) -> None:
        model.layers[2](model.layers[1](batch))
        if here:
            raise Broken("out of memory")

    wrong: list[tuple[str, type[Exception], dict[str, Any]]] = []
    for estimator in ("pooled", "batches"):
        wrong.append(("the file is damaged", Broken, {"batches": breaks([x]) if here else [x] * 4, "estimator": estimator}))
        wrong.append(("out of memory", Broken, {"batches": [x] * 2, "forward": bad_forward, "estimator": estimator}))
        wrong.append(("incompatible", ValueError, {"batches": [x[..., :3]] if here else [x, x], "estimator": estimator}))
    wrong.append(("expected estimator to be", ValueError, {"batches": [x], "estimator": "mean" if here else "pooled"}))
    wrong.append(("expected batches to be", TypeError, {"batches": x if here else [x]}))
    for text, kind, options in wrong:
        model = stack()
        before = model.get_weights()
        try:
            recalibrate(model, **options)
        except Exception as error:
            assert isinstance(error, kind if here else RuntimeError), (text, error)
            assert text in str(error), error
            assert here or f"rank {last}" in str(error), error
        else:
            raise AssertionError(f"no error: {text}")
        assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    for data, text in (([], "no rank has a batch"), ([x[:1, :1, :1]] if here else [], "more than 1 value")):
        for estimator in ("pooled", "batches"):
            with pytest.raises(ValueError, match=re.escape(text)):
                recalibrate(stack(), data, forward=lambda m, x: m.layers[1](x), estimator=estimator)
    recalibrate(stack(), [x], estimator="batches")


def check_disagreements() -> None:
    """Models or arguments that differ between ranks, and layers that are used in another order."""
    if hvd.size() == 1:
        return
    x = images()[:6]
    odd = hvd.rank() == hvd.size() - 1

    def sequence(*layers: Any) -> keras.Model:
        return keras.Sequential([keras.Input(x.shape[1:]), *layers])

    def order(model: Any, batch: np.ndarray) -> None:
        for layer in reversed(norms(model)) if odd else norms(model):
            layer(batch)

    for options, text in (
        ({"model": sequence(norm(epsilon=1e-3 if odd else 1e-5, name="a"))}, "the ranks disagree"),
        ({"model": sequence(*(norm(name=f"n{i}") for i in range(1 + odd)))}, "1 and 2 layers"),
        ({"model": stack(), "init_affine": odd}, "the ranks disagree"),
        ({"model": stack(), "forward": order, "estimator": "batches"}, "the same layers in the same order"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            recalibrate(batches=[x], **options)


def check_process_sets() -> None:
    """Ranks share their data within a process set alone; there, too, a rank may have no batch."""
    if hvd.size() < 3:
        return
    sets = [hvd.add_process_set(group) for group in ([0, 2], [1])]
    number = int(hvd.rank() == 1)
    edges = np.cumsum(recalibration.GLOBAL_BATCHES)[:-1]
    for estimator in ("pooled", "batches"):
        model = stack()
        mine = np.split(images() + np.float32(number), edges) if hvd.rank() else []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the statistics of layer")
            recalibrate(model, mine, estimator=estimator, process_set=sets[number])
        found = recalibration.digest(statistics(model))
        everyone = hvd.allgather_object(found)
        assert everyone[0] == everyone[2] != everyone[1]
        assert number or found == recalibration.digest(recalibration.reference(estimator))


def check_the_default_ignores_what_was_stored() -> None:
    """NaN after an overflow, on one rank alone: one call ends with the reference's bytes on all."""
    model = stack()
    if hvd.rank() == 0:
        for layer in norms(model):
            gamma, beta, mean, variance = layer.get_weights()
            mean[0] = variance[1] = np.nan
            layer.set_weights([gamma, beta, mean, variance])
    mine = [images()[part] for part in recalibration.batches_shards(hvd.size(), "uneven")[hvd.rank()]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        recalibrate(model, iter(mine))
    assert recalibration.digest(statistics(model)) == recalibration.digest(recalibration.reference("batches"))
