"""The names of Keras layers' collectives: different for different models, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable

import keras
import pytest
from keras import layers

from hvd_syncbn.keras import SyncBatchNormalization, convert_sync_batchnorm, revert_sync_batchnorm


def make(name: str | None = None, width: int = 4) -> keras.Model:
    norm = layers.BatchNormalization
    return keras.Sequential([keras.Input((3,)), layers.Dense(width), norm(), layers.ReLU(), norm(name="last")], name=name)


class Gan(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.generator = make(width=4)
        self.discriminator = make(width=8)


PATHS = ["batch_normalization", "last"]


def names(model: keras.Model) -> list[str]:
    return [x.collective_name for x in model._flatten_layers() if isinstance(x, SyncBatchNormalization)]


def test_models_that_are_converted_one_by_one() -> None:
    for name in ("generator", "discriminator"):
        assert names(convert_sync_batchnorm(make(name))) == [f"{name}.{path}" for path in PATHS]


def test_models_without_names() -> None:
    """Are told apart where they are converted together; Keras's count of models is not in a name."""
    keras.Sequential()
    assert names(convert_sync_batchnorm(make())) == [f"sequential.{path}" for path in PATHS]
    want = [f"gan.{model}.{path}" for model in ("generator", "discriminator") for path in PATHS]
    for _ in range(2):
        assert sorted(names(convert_sync_batchnorm(Gan()))) == sorted(want)


@pytest.mark.parametrize(
    "way",
    [
        convert_sync_batchnorm,
        lambda model: convert_sync_batchnorm(convert_sync_batchnorm(model)),
        lambda model: convert_sync_batchnorm(revert_sync_batchnorm(convert_sync_batchnorm(model))),
        lambda model: keras.models.clone_model(convert_sync_batchnorm(model)),
        lambda model: convert_sync_batchnorm(keras.models.clone_model(convert_sync_batchnorm(model))),
    ],
    ids=["once", "twice", "after revert", "clone", "clone, converted again"],
)
@pytest.mark.parametrize("name", ["generator", None])
def test_a_function_of_the_model_alone(name: str | None, way: Callable[[keras.Model], keras.Model]) -> None:
    """Whatever else this process has made: a rank that loads a file, or joins an elastic job, agrees with the others."""
    convert_sync_batchnorm(make(name))
    assert names(way(make(name))) == [f"{name or 'sequential'}.{path}" for path in PATHS]


def test_the_width_is_not_in_it() -> None:
    """Ranks that disagree about the number of channels have to meet, to raise an error."""
    assert names(convert_sync_batchnorm(make(width=4))) == names(convert_sync_batchnorm(make(width=8)))


def test_a_layer_by_itself() -> None:
    """Keeps its own name."""
    layer = layers.BatchNormalization()
    assert names(convert_sync_batchnorm(keras.Sequential([layer]))) == ["sequential.batch_normalization"]
    assert convert_sync_batchnorm(layer).collective_name == layer.name
