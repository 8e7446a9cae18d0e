"""Reading and setting the state of a layer: ``get_state``, ``set_state``."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from hvd_syncbn.exchange import BatchNormState, complement
from hvd_syncbn.tf_impl.keras.layer import SyncBatchNormalization, renormalizes


def get_state(layer: keras.layers.Layer) -> BatchNormState:
    """Return the weights, moving statistics and options of a batch normalization layer.

    Args:
        layer: `SyncBatchNormalization` or `keras.layers.BatchNormalization`, built.

    Returns:
        The state, as float32 copies. `momentum` follows PyTorch's convention: one minus Keras's.

    Raises:
        TypeError: `layer` is not a batch normalization layer.
        ValueError: `layer` is not built.

    Example:

    >>> import keras
    >>> from hvd_syncbn.keras import get_state
    >>> layer = keras.layers.BatchNormalization()
    >>> layer.build((None, 3))
    >>> state = get_state(layer)
    >>> state.variance, state.momentum, state.unbiased
    (array([1., 1., 1.], dtype=float32), 0.01, False)
    """
    _check(layer)
    gamma, beta, mean, variance = (
        None if v is None else np.array(keras.ops.convert_to_numpy(v.value), np.float32)
        for v in (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
    )
    momentum = None if layer.momentum is None else complement(layer.momentum)
    unbiased = getattr(layer, "unbiased_variance", False)
    return BatchNormState(gamma, beta, mean, variance, layer.epsilon, momentum, unbiased)  # type: ignore[arg-type]


def set_state(layer: keras.layers.Layer, state: BatchNormState) -> None:
    """Set the weights, moving statistics, epsilon and momentum of a batch normalization layer from a state.

    A `SyncBatchNormalization` also adopts `unbiased`. Keras's own layer keeps updating with the biased variance; its present
    moving variance is the state's. A function that is already traced (`fit`, `predict`) keeps the epsilon and momentum that it
    was traced with: compile the model afterwards.

    Args:
        layer: As in `get_state`.
        state: The result of `get_state` in either framework or of `from_caffe`, or a state constructed directly.

    Raises:
        TypeError: `layer` is not a batch normalization layer, or `state` is not a `BatchNormState`.
        ValueError: The layer is not built; it has a different number of channels; it has no gamma or beta, but the state needs
            them; the state has `momentum=None`, but the layer cannot average over all batches; the layer does batch
            renormalization. Nothing is changed in these cases.

    Example:

    >>> import keras
    >>> from hvd_syncbn.exchange import from_caffe
    >>> from hvd_syncbn.keras import set_state
    >>> layer = keras.layers.BatchNormalization()
    >>> layer.build((None, 2))
    >>> set_state(layer, from_caffe([2.0, 4.0], [8.0, 2.0], 2.0))
    >>> layer.moving_mean.numpy(), layer.momentum
    (array([1., 2.], dtype=float32), 0.999)
    """
    _check(layer)
    if not isinstance(state, BatchNormState):
        raise TypeError(f"Expected a BatchNormState. Received: {type(state).__name__}")
    if renormalizes(layer):
        raise ValueError(
            "A BatchNormState does not contain the state of batch renormalization. "
            f"Received: layer {layer.name!r} with renorm=True"
        )
    ours = isinstance(layer, SyncBatchNormalization)
    if state.momentum is None and not (ours and layer.averages):
        raise ValueError(
            "an average over all batches needs their number: use a SyncBatchNormalization created with momentum=None. "
            f"Received: momentum=None for layer {layer.name!r}"
        )
    channels = layer.moving_mean.shape[0]
    gamma, beta = state.fitted(channels, layer.gamma is not None, layer.beta is not None, f"layer {layer.name!r}")
    variables = (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
    for variable, value in zip(variables, (gamma, beta, state.mean, state.variance), strict=True):
        if variable is not None:
            variable.assign(value)
    layer.epsilon = state.epsilon
    layer.momentum = None if state.momentum is None else complement(state.momentum)
    if ours:
        layer.unbiased_variance = state.unbiased


def _check(layer: Any) -> None:
    if not isinstance(layer, keras.layers.BatchNormalization):
        raise TypeError(
            f"Expected a keras.layers.BatchNormalization. Received: {type(layer).__name__} of {type(layer).__module__}"
        )
    if not layer.built:
        raise ValueError(
            f"The layer has no weights yet: call `build()`, or call the model once. Received: layer {layer.name!r}"
        )
