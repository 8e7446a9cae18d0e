"""How running statistics average, in both frameworks: exponential, cumulative, and Caffe's without a bias at its start.

The weights are checked against Caffe's recurrence in test_population.py; here the layers against a loop of the definition.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytest.importorskip("horovod")

import horovod.tensorflow  # noqa: E402
import horovod.torch  # noqa: E402
import keras  # noqa: E402
import torch  # noqa: E402

from hvd_syncbn import protocol  # noqa: E402
from hvd_syncbn.keras import SyncBatchNormalization, convert_sync_batchnorm, revert_sync_batchnorm  # noqa: E402
from hvd_syncbn.tensorflow import sync_batch_norm  # noqa: E402
from hvd_syncbn.torch import SyncBatchNorm, get_state  # noqa: E402
from hvd_syncbn.torch import revert_sync_batchnorm as revert_torch  # noqa: E402
from tests.arrays import same_bits  # noqa: E402

STEPS, EPS = 12, 1e-5
WAYS = [  # momentum as PyTorch spells it, and Keras
    (0.1, 0.9, True),
    (0.01, 0.99, True),
    (None, None, False),
    (None, None, True),
    (0.3, 0.7, False),
]


@pytest.fixture(scope="module", autouse=True)
def _horovod() -> None:
    horovod.torch.init()
    horovod.tensorflow.init()


def batches() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [(rng.standard_normal((3 + i % 4, 4, 5)) * 3 + 7).astype(np.float32) for i in range(STEPS)]


def reference(momentum: float | None, zero_debias: bool, unbiased: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The running statistics by the pure-Python reference, from 0 and 1."""
    mean, variance = [0.0] * 4, [1.0] * 4
    for number, x in enumerate(batches()):
        packet = protocol.forward_packet(x.astype(np.float64), EPS, "float32")
        weights = (1.0, 0.0) if momentum is None else (1 - momentum, momentum)
        if momentum is None or zero_debias:
            weights = protocol.average_weights(weights[0], number)
        for c, stat in enumerate(protocol.finish_forward(packet, EPS)):
            var = protocol.unbiased(stat.var, packet.count) if unbiased or zero_debias else stat.var
            mean[c] = protocol.running(mean[c], stat.mean, *weights)
            variance[c] = protocol.running(variance[c], var, *weights)
    return np.array(mean, np.float32), np.array(variance, np.float32)


def in_torch(momentum: float | None, zero_debias: bool) -> SyncBatchNorm:
    layer = SyncBatchNorm(4, EPS, momentum, zero_debias=zero_debias)
    for x in batches():
        layer(torch.from_numpy(x))
    return layer


def in_keras(momentum: float | None, zero_debias: bool, graph: bool, **options: Any) -> SyncBatchNormalization:
    layer = SyncBatchNormalization(momentum=momentum, epsilon=EPS, axis=1, zero_debias=zero_debias, **options)
    layer.build((None, 4, 5))
    train = tf.function(lambda x: layer(x, training=True), autograph=False, reduce_retracing=True) if graph else layer
    for x in batches():
        train(tf.constant(x)) if graph else layer(x, training=True)
    return layer


@pytest.mark.parametrize(("momentum", "keras_momentum", "zero_debias"), WAYS)
def test_the_same_bytes_in_both_frameworks(momentum: float | None, keras_momentum: float | None, zero_debias: bool) -> None:
    mean, variance = reference(momentum, zero_debias)
    layer = in_torch(momentum, zero_debias)
    assert same_bits(layer.running_mean.numpy(), mean) and same_bits(layer.running_var.numpy(), variance)
    for graph in (False, True):
        other = in_keras(keras_momentum, zero_debias, graph, unbiased_variance=not zero_debias)
        assert same_bits(other.moving_mean.numpy(), mean) and same_bits(other.moving_variance.numpy(), variance)


def test_keras_convention_of_the_cumulative_average() -> None:
    layer = in_keras(None, False, False)
    mean, variance = reference(None, False, unbiased=False)
    assert same_bits(layer.moving_mean.numpy(), mean) and same_bits(layer.moving_variance.numpy(), variance)
    x = [b.astype(np.float64) for b in batches()]
    # The average of the batches' statistics; float32 is rounded to in every one of 12 batches.
    np.testing.assert_allclose(mean, np.mean([b.mean((0, 2)) for b in x], 0), rtol=3e-6)
    np.testing.assert_allclose(variance, np.mean([b.var((0, 2)) for b in x], 0), rtol=3e-6)


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.001])
def test_caffe_by_its_definition(momentum: float) -> None:
    """Three blobs, as Caffe keeps them: sums of means, of m/(m-1) variances, and s; what is used is sum / s."""
    sums, s = [np.zeros(4), np.zeros(4)], 0.0
    for x in (b.astype(np.float64) for b in batches()):
        m = x.size / 4
        s = s * (1 - momentum) + 1
        for blob, stat in zip(sums, (x.mean((0, 2)), x.var((0, 2)) * m / (m - 1)), strict=True):
            blob *= 1 - momentum
            blob += stat
    layer = in_torch(momentum, True)
    # Ours are float32 after every one of 12 batches, and so are the weights.
    np.testing.assert_allclose(layer.running_mean.numpy(), sums[0] / s, rtol=3e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), sums[1] / s, rtol=3e-6)
    plain = in_torch(momentum, False)
    assert abs(plain.running_mean.numpy() / (sums[0] / s) - 1).min() > 0.2  # which is what it is for


def test_the_count_goes_with_the_state() -> None:
    """Half of it, a state, the other half: the bytes of all of it. In PyTorch the state is that of nn.BatchNorm."""
    whole = in_torch(0.1, True)
    first, second = (SyncBatchNorm(4, EPS, 0.1, zero_debias=True) for _ in range(2))
    for x in batches()[:5]:
        first(torch.from_numpy(x))
    second.load_state_dict(first.state_dict())
    assert first.state_dict().keys() == torch.nn.BatchNorm1d(4).state_dict().keys()
    second = copy.deepcopy(second)
    for x in batches()[5:]:
        second(torch.from_numpy(x))
    assert torch.equal(second.running_mean, whole.running_mean) and torch.equal(second.running_var, whole.running_var)

    inputs = keras.Input((4, 5))
    layer = SyncBatchNormalization(momentum=0.9, epsilon=EPS, axis=1, zero_debias=True)
    model = keras.Model(inputs, layer(inputs))
    for x in batches()[:5]:
        model(x, training=True)
    again = keras.Model.from_config(model.get_config())
    again.set_weights(model.get_weights())
    assert again.layers[1].zero_debias and again.layers[1].batches.numpy() == 5
    for x in batches()[5:]:
        again(x, training=True)
    assert same_bits(again.layers[1].moving_mean.numpy(), whole.running_mean.numpy())
    assert same_bits(again.layers[1].moving_variance.numpy(), whole.running_var.numpy())


def test_the_count_is_a_weight_only_where_it_is_needed() -> None:
    for options, number in (({}, 4), ({"momentum": None}, 5), ({"zero_debias": True}, 5)):
        layer = SyncBatchNormalization(**options)
        layer.build((None, 3))
        assert len(layer.weights) == number and len(layer.trainable_weights) == 2
        config = layer.get_config()
        assert config["momentum"] == options.get("momentum", 0.99)
        assert SyncBatchNormalization.from_config(config).averages == layer.averages == bool(options)
    layer(np.ones((2, 3), np.float32))
    assert layer.batches.numpy() == 0  # evaluation counts nothing


def test_gradients_and_repr() -> None:
    layer = SyncBatchNormalization(zero_debias=True)
    x = tf.constant(batches()[0])
    plain = SyncBatchNormalization()
    found = []
    for each in (layer, plain):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = each(x, training=True)
        found.append(tape.gradient(y, [x, each.gamma.value], output_gradients=tf.cast(x, y.dtype)))
    assert all(same_bits(a.numpy(), b.numpy()) for a, b in zip(*found, strict=True))
    assert "zero_debias=True" in repr(SyncBatchNorm(3, zero_debias=True)) and "zero_debias" not in repr(SyncBatchNorm(3))


def test_what_cannot_be_kept_is_said() -> None:
    model = keras.Sequential([keras.Input((3,)), SyncBatchNormalization(momentum=None)])
    with pytest.raises(ValueError, match=r"only supports averaging with a momentum\. Received: .*momentum=None"):
        revert_sync_batchnorm(model)
    assert (
        not convert_sync_batchnorm(keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])).layers[0].averages
    )
    with pytest.warns(UserWarning, match="'0' averages with its momentum only"):
        revert_torch(torch.nn.Sequential(SyncBatchNorm(3, zero_debias=True)))
    with pytest.raises(ValueError, match=r"`batches` is needed.*zero_debias=True"):
        ones = np.ones(3, np.float32)
        sync_batch_norm(np.ones((2, 3), np.float32), ones, ones, ones, ones, training=True, zero_debias=True)
    assert get_state(SyncBatchNorm(3, momentum=None)).momentum is None
