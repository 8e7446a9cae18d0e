"""The error of a global batch of one value per channel: what it adds in an elastic job."""

from __future__ import annotations

from collections.abc import Callable

import pytest

ADVICE = "start it with `horovodrun --min-np 2` or more, "


def train_torch() -> None:
    hvd = pytest.importorskip("horovod.torch")
    torch = pytest.importorskip("torch")
    from hvd_syncbn.torch import SyncBatchNorm

    hvd.init()
    SyncBatchNorm(3)(torch.ones(1, 3))


def train_eagerly() -> None:
    hvd = pytest.importorskip("horovod.tensorflow")
    tf = pytest.importorskip("tensorflow")
    from hvd_syncbn.keras import SyncBatchNormalization

    hvd.init()
    SyncBatchNormalization()(tf.ones([1, 3]), training=True)


def train_in_a_graph() -> None:
    hvd = pytest.importorskip("horovod.tensorflow")
    tf = pytest.importorskip("tensorflow")
    from hvd_syncbn.keras import SyncBatchNormalization

    hvd.init()
    layer = SyncBatchNormalization()
    tf.function(lambda x: layer(x, training=True))(tf.ones([1, 3]))


@pytest.mark.parametrize("elastic", ["1", "0", None])
@pytest.mark.parametrize("train", [train_torch, train_eagerly, train_in_a_graph])
def test_advice_in_elastic_jobs_only(train: Callable[[], None], elastic: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOROVOD_ELASTIC", raising=False)
    if elastic is not None:
        monkeypatch.setenv("HOROVOD_ELASTIC", elastic)
    with pytest.raises(Exception, match="Expected more than 1 value per channel when training") as caught:
        train()
    assert (ADVICE in str(caught.value)) == (elastic == "1"), caught.value
    assert ("--blacklist-cooldown-range" in str(caught.value)) == (elastic == "1")
