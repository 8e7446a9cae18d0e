"""`diagnose` in both frameworks: it names what is wrong, in the model of test_recalibrate_default.py and in small ones."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from hvd_syncbn import diagnosis
from tests.unit.test_recalibrate_default import BATCH, SAMPLES, Array, Keras, Torch, data


def diagnose(framework: Any, x: Array | None) -> diagnosis.Diagnosis:
    if isinstance(framework, Torch):
        import torch

        from hvd_syncbn.torch import diagnose

        return diagnose(framework.model, None if x is None else torch.tensor(x).split(BATCH))
    from hvd_syncbn.keras import diagnose as diagnose_keras

    if x is None:
        return diagnose_keras(framework.model)
    images = np.moveaxis(x, 1, -1)
    return diagnose_keras(framework.model, [images[i : i + BATCH] for i in range(0, SAMPLES, BATCH)])


@pytest.mark.parametrize("framework", [Torch, Keras])
def test_poor_evaluation(framework: type[Any]) -> None:
    """Before `recalibrate` the advice is to call it, afterwards nothing is off; the model does not change."""
    x, y = data()
    model = framework()
    model.fit(x, y)
    before = model.statistics()
    found = diagnose(model, x)
    assert [a.tobytes() for a in model.statistics()] == [a.tobytes() for a in before]
    assert [layer.kind for layer in found.layers] == ["synchronized"] * 3
    for layer in found.layers:
        assert layer.is_off and layer.updates == 20 and layer.initial_weight == pytest.approx(0.99**20)
    expected = "After 20 steps the initial statistics 0 and 1 still have a weight of 0.82"
    assert found.advice[0].startswith(expected) and "recalibrate(model, batches)" in found.advice[0]
    assert found.advice[0].endswith(
        f"momentum={'0.21' if framework is Torch else '0.79'} so many steps would have been enough."
    )
    model.recalibrate(x)
    found = diagnose(model, x)
    for layer in found.layers:
        assert layer.shift is not None and layer.ratio is not None
        # The same estimate of the same data, rounded to float32 once.
        assert layer.shift.max() < 1e-6 and abs(layer.ratio - 1).max() < 1e-6 and not layer.is_off


@pytest.mark.parametrize("framework", [Torch, Keras])
def test_nan(framework: type[Any]) -> None:
    x, _ = data()
    model = framework()
    model.set_nan()
    found = diagnose(model, x)
    assert [layer.nonfinite_statistics for layer in found.layers] == [1, 1, 0]
    assert found.advice[0].startswith("Running statistics are NaN or infinite in ")
    assert "1 NaN or infinite statistics" in " ".join(str(found).split())
    x[0, 0, 0, 0] = np.inf
    assert sum(layer.nonfinite_data for layer in diagnose(model, x).layers) > 0


@pytest.mark.parametrize("framework", [Torch, Keras])
def test_without_data(framework: type[Any]) -> None:
    found = diagnose(framework(), None)
    assert all(layer.shift is None and layer.mean_shift == 0 and layer.mean_ratio == 1 for layer in found.layers)
    assert len(found.advice) == 1


@pytest.mark.parametrize("framework", [Torch, Keras])
def test_picture_and_table(framework: type[Any]) -> None:
    x, y = data()
    model = framework()
    model.fit(x, y)
    found = diagnose(model, x)
    figure = found.plot()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [layer.name for layer in found.layers]
    assert all(len(axes.lines) == 3 and len(axes.lines[0].get_xdata()) == 8 for axes in figure.axes)
    text = str(found)
    assert all(f" {layer.name} " in text for layer in found.layers) and text.splitlines()[-1].startswith("2. ") is False
    assert f"1. {found.advice[0]}" in " ".join(text.split())


def kinds(found: diagnosis.Diagnosis) -> dict[str, str]:
    return {layer.name: layer.kind for layer in found.layers}


def test_kinds_of_layers_in_torch() -> None:
    pytest.importorskip("horovod.torch").init()
    import torch
    from torch import nn

    from hvd_syncbn.torch import SyncBatchNorm, diagnose, freeze_batchnorm

    alike = [SyncBatchNorm(2), SyncBatchNorm(2)]
    alike[1].collective_name = alike[0].collective_name
    frozen = freeze_batchnorm(SyncBatchNorm(2))
    model = nn.ModuleDict({"local": nn.BatchNorm1d(2), "a": alike[0], "b": alike[1], "frozen": frozen})
    x = torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    found = diagnose(model, [x], forward=lambda model, x: [model[name](x) for name in ("local", "a", "frozen")])
    assert kinds(found) == {"local": "local", "a": "synchronized", "b": "synchronized", "frozen": "frozen"}
    assert [layer.dead for layer in found.layers] == [1, 1, 0, 0]
    assert found.advice[0] == (
        "These layers are not synchronized: 'local'. Call hvd_syncbn.torch.convert_sync_batchnorm(model)."
    )
    assert found.advice[1].startswith("These layers share the name of a collective: 'a', 'b'.")
    assert "All inputs of a channel are equal (a dead filter or activation) in 'local', 'a'." in found.advice
    assert "The data did not reach 'b', or they have no running statistics." in found.advice


def test_kinds_of_layers_in_keras() -> None:
    pytest.importorskip("horovod.tensorflow").init()
    import keras

    from hvd_syncbn.keras import SyncBatchNormalization, diagnose, freeze_batchnorm

    inputs = keras.Input((2,))
    layers = [
        keras.layers.BatchNormalization(name="local"),
        SyncBatchNormalization(name="a"),
        SyncBatchNormalization(name="b"),
        SyncBatchNormalization(name="frozen"),
    ]
    model = keras.Model(inputs, [layer(inputs) for layer in layers])
    layers[2].collective_name = "a"
    freeze_batchnorm(layers[3])
    found = diagnose(model, [np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]], "float32")])
    assert kinds(found) == {"local": "local", "a": "synchronized", "b": "synchronized", "frozen": "frozen"}
    assert [layer.dead for layer in found.layers] == [1, 1, 1, 0]
    assert found.advice[0].startswith(
        "These layers are not synchronized: 'local'. Call hvd_syncbn.keras.convert_sync_batchnorm"
    )
    assert found.advice[1].startswith("These layers share the name of a collective: 'a', 'b'.")


def test_right_statistics_of_other_data() -> None:
    """With a short memory the same model is right on its data, and off on data of another preprocessing."""
    pytest.importorskip("horovod.torch").init()
    x, y = data()
    model = Torch()
    for norm in (model.model[1], model.model[4], model.model[7]):
        norm.momentum = 0.5
    model.fit(x, y)
    model.recalibrate(x)
    right = diagnose(model, x)
    assert right.advice == (
        "The running statistics are those of this data. If evaluation is poor on other data, the model overfits, or the "
        "preprocessing differs.",
    )
    other = diagnose(copy.copy(model), x * 255)
    assert "are not those of this data" in other.advice[0]


def test_wrong_arguments() -> None:
    pytest.importorskip("horovod.torch").init()
    import keras
    import torch

    from hvd_syncbn.keras import SyncBatchNormalization
    from hvd_syncbn.keras import diagnose as diagnose_keras
    from hvd_syncbn.torch import diagnose as diagnose_torch

    with pytest.raises(TypeError, match=r"expected a torch.nn.Module. Received: int"):
        diagnose_torch(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected batches to be an iterable of batches"):
        diagnose_torch(Torch().model, torch.zeros(3, 3, 6, 6))
    with pytest.raises(TypeError, match="single Keras 3 model or layer"):
        diagnose_keras(3)
    with pytest.raises(ValueError, match="the model is not built"):
        diagnose_keras(keras.Sequential([SyncBatchNormalization()]))
