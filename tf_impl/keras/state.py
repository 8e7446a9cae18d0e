"""A layer's state, out of it and into it: ``get_state``, ``set_state``."""

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
        Its state, copied and rounded to float32; `momentum` is in PyTorch's sense, one minus Keras's.

    Raises:
        TypeError: Not a batch normalization layer.
        ValueError: It is not built.

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
    """Give a batch normalization layer the weights, moving statistics, epsilon and momentum of a state.

    A `SyncBatchNormalization` takes over `unbiased`, too; Keras's own layer goes on with the biased variance, which changes
    nothing now. A function that is traced already (`fit`, `predict`) keeps the epsilon and momentum that it was traced with:
    compile the model afterwards.

    Args:
        layer: As in `get_state`.
        state: Of `get_state` in either framework, `from_caffe`, or made by hand.

    Raises:
        TypeError: Not a batch normalization layer, or not a state.
        ValueError: It is not built; another number of channels; a layer without gamma or beta and a state that needs them;
            `momentum=None` and a layer that cannot average over all batches; batch renormalization. Nothing is changed then.

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
        raise ValueError(f"A layer that does batch renormalization has more state than this. Received: layer {layer.name!r}")
    ours = isinstance(layer, SyncBatchNormalization)
    if state.momentum is None and not (ours and layer.averages):
        raise ValueError(
            "an average over all batches needs their number, which only a SyncBatchNormalization made with momentum=None has. "
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
        raise ValueError(f"The layer has no weights yet: call `build()`, or the model once. Received: layer {layer.name!r}")
