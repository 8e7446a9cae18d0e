"""A channel that is not finite in a batch: outputs and gradients are NaN, running statistics keep their values, one warning."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest

from hvd_syncbn import native
from tests.needs import need

torch = pytest.importorskip("torch")
hvd = pytest.importorskip("horovod.torch")
hvd.init()

from hvd_syncbn.torch import (  # noqa: E402
    SyncBatchNorm,
    accumulate_statistics,
    convert_sync_batchnorm,
    diagnose,
    revert_sync_batchnorm,
)

BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", BAD)
def test_running_statistics_survive_an_overflow(bad: float, momentum: float | None) -> None:
    """As when a loss scaler skips the step: the layer goes on as if that channel had not seen the batch."""
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    layer = SyncBatchNorm(5, momentum=momentum)
    layer(x[0])
    before = layer.running_mean.clone(), layer.running_var.clone()
    x[1, 2, 3, 4] = bad
    with pytest.warns(UserWarning, match=rf"layer '{layer.collective_name}'.* Received: 1 of 5 channels"):
        y = layer(x[1])
    assert y[:, 3].isnan().all() and y[:, [0, 1, 2, 4]].isfinite().all()
    after = layer.running_mean, layer.running_var
    for old, new in zip(before, after, strict=True):
        assert new[3] == old[3] and (new[[0, 1, 2, 4]] != old[[0, 1, 2, 4]]).all()
    assert layer.eval()(x[2]).isfinite().all()
    assert layer.num_batches_tracked == 2


def test_one_warning_per_layer(recwarn: pytest.WarningsRecorder) -> None:
    layers = [SyncBatchNorm(2) for _ in range(2)]
    x = torch.full((4, 2, 3), torch.nan)
    for _ in range(3):
        for layer in layers:
            layer(x)
    named = [str(warning.message) for warning in recwarn if "channels that are not finite" in str(warning.message)]
    assert [name.split("'")[1] for name in named] == [layer.collective_name for layer in layers]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_as_in_pytorch(momentum: float | None) -> None:
    """With ``skip_nonfinite=False`` the statistics of the channel become NaN permanently; PyTorch's are not finite, either."""
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    x[1, 2, 3, 4] = torch.inf
    layers = [SyncBatchNorm(5, momentum=momentum, skip_nonfinite=False), torch.nn.BatchNorm1d(5, momentum=momentum)]
    converted = convert_sync_batchnorm(torch.nn.BatchNorm1d(5, momentum=momentum))
    converted.skip_nonfinite = False
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layers[0])))
    assert "skip_nonfinite=False" in repr(copied) and "skip_nonfinite" not in repr(SyncBatchNorm(5))
    for layer in (*layers, converted, copied):
        for i in range(3):
            layer(x[i])
    ours, theirs = ([getattr(layer, name) for name in ("running_mean", "running_var")] for layer in layers)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.isnan().tolist() == [False, False, False, True, False]
        assert reference.isfinite().tolist() == [True, True, True, False, True]  # an infinite mean stays infinite
        assert mine.numpy().view(np.uint32)[3] == 0x7FC00000  # the canonical NaN
    for layer in (converted, copied):
        assert layer.running_mean.numpy().tobytes() == ours[0].numpy().tobytes()
        assert layer.running_var.numpy().tobytes() == ours[1].numpy().tobytes()
    assert layers[0].eval()(x[0])[:, 3].isnan().all()
    assert "skip_nonfinite" not in vars(revert_sync_batchnorm(converted))


@pytest.mark.parametrize("skip", [True, False])
def test_a_loss_scaler_skips_the_step(skip: bool) -> None:
    """One overflow, as under mixed precision: the scaler skips the step, and evaluation is finite by default."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), SyncBatchNorm(4, skip_nonfinite=skip), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for scale in (1.0, torch.inf, 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        x = torch.randn(8, 3)
        x[0, 0] *= scale
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        changed = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert changed == (scale == 1.0)
    assert scaler.get_scale() == 2.0
    y = model.eval()(torch.randn(8, 3))
    assert y.isfinite().all() if skip else y.isnan().all()


def test_count() -> None:
    """Batches with such channels are counted by layer, also those of micro-batches, once each; ``diagnose`` shows them."""
    x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
    x[1:4, 2, 3] = torch.nan
    for batches, finite in ((1, True), (3, False)):
        layer = SyncBatchNorm(5)
        accumulate_statistics(layer, batches)
        for batch in x:
            layer(batch)
        assert native.nonfinite_batches(layer.collective_name) == 3
        found = diagnose(torch.nn.Sequential(layer), [x[0]] if finite else None)
        assert found.layers[0].nonfinite_batches == 3
        assert any(line.startswith("Channels of '0' were NaN or infinite in some training steps.") for line in found.advice)
        assert "NaN or infinite in 3 training steps" in " ".join(str(found).split())
    assert native.nonfinite_batches("a layer that never ran") == 0


KERAS = """
import numpy as np, keras
import horovod.tensorflow as hvd
hvd.init()
from hvd_syncbn.keras import SyncBatchNormalization, diagnose
from hvd_syncbn.tensorflow import sync_batch_norm
x = np.random.default_rng(0).standard_normal((2, 4, 6, 5)).astype("float32")
layer = SyncBatchNormalization(name="overflow")
layer(x[0], training=True)
before = [v.numpy() for v in (layer.moving_mean, layer.moving_variance)]
x[1, 2, 3, 4] = np.inf
for _ in range(2):
    y = layer(x[1], training=True).numpy()
assert np.isnan(y[..., 4]).all() and np.isfinite(y[..., :4]).all()
for old, variable in zip(before, (layer.moving_mean, layer.moving_variance)):
    assert variable.numpy()[4] == old[4] and (variable.numpy()[:4] != old[:4]).all()
assert np.isfinite(layer(x[0], training=False)).all()
model = keras.Sequential([keras.Input((6, 5)), layer])
assert diagnose(model).layers[0].nonfinite_batches == 2
diagnose(model, [x[1]])  # is no training step
assert diagnose(model).layers[0].nonfinite_batches == 2
assert "NaN or infinite in 2 training steps" in " ".join(str(diagnose(model)).split())

as_keras = SyncBatchNormalization(name="as_keras", skip_nonfinite=False)
as_keras = SyncBatchNormalization.from_config(as_keras.get_config())
for i in (0, 1, 0):
    as_keras(x[i], training=True)
for variable in (as_keras.moving_mean, as_keras.moving_variance):
    assert np.isnan(variable.numpy()).tolist() == [False] * 4 + [True]
assert np.isnan(as_keras(x[0], training=False)).any()
y, mean, variance = sync_batch_norm(x[1], None, None, np.zeros(5, "float32"), np.ones(5, "float32"), training=True,
                                    skip_nonfinite=False, name="function")
assert np.isnan(mean).tolist() == np.isnan(variance).tolist() == [False] * 4 + [True]
"""


def test_keras() -> None:
    """The same in Keras; the warning is in TensorFlow's log, as the kernel runs inside a graph."""
    need("tensorflow", "horovod.tensorflow")
    command = [sys.executable, "-c", KERAS]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stderr
    assert printed.count("layer 'overflow': the input is NaN, infinite or out of range") == 1
    assert "1 of 5 channels" in printed
