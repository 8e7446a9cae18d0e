"""A channel that is not finite in a batch: outputs and gradients are NaN, running statistics keep their values, one warning."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tests.needs import need

torch = pytest.importorskip("torch")
hvd = pytest.importorskip("horovod.torch")
hvd.init()

from hvd_syncbn.torch import SyncBatchNorm  # noqa: E402

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


KERAS = """
import numpy as np, keras
import horovod.tensorflow as hvd
hvd.init()
from hvd_syncbn.keras import SyncBatchNormalization
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
"""


def test_keras() -> None:
    """The same in Keras; the warning is in TensorFlow's log, as the kernel runs inside a graph."""
    need("tensorflow", "horovod.tensorflow")
    command = [sys.executable, "-c", KERAS]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stderr
    assert printed.count("layer 'overflow': the input is NaN, infinite or out of range") == 1
    assert "1 of 5 channels" in printed
