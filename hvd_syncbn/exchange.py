"""The state of a batch norm layer as numpy arrays: from one framework into the other, and from Caffe.

Knows no framework. ``get_state`` and ``set_state`` of ``hvd_syncbn.torch`` and ``hvd_syncbn.keras`` read and write layers;
docs/exchange.md has the conventions by which the frameworks differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float32]

CAFFE_MOMENTUM = 0.001  # 1 - moving_average_fraction, of which Caffe's default is 0.999


@dataclass(frozen=True, eq=False)
class BatchNormState:
    """What a batch norm layer holds, in one set of conventions.

    Anything array-like is taken for the vectors, and rounded to float32.

    Args:
        gamma: scale of each channel, shape ``(C,)``; None where the layer has none, which is 1.
        beta: offset of each channel, shape ``(C,)``; None where the layer has none, which is 0.
        mean: running mean of each channel, shape ``(C,)``.
        variance: running variance of each channel, shape ``(C,)``.
        epsilon: added to the variance.
        momentum: weight of a new batch in the running statistics, as PyTorch has it; None for the average over all batches.
        unbiased: whether the running variance takes ``n / (n - 1)`` times a batch's variance.

    Raises:
        TypeError: something is not numeric.
        ValueError: vectors of different lengths or not of one dimension; a negative variance; epsilon or momentum out of range.

    Example:
        >>> state = BatchNormState([1, 1], None, [0.5, 0.25], [4, 9], epsilon=1e-5, momentum=0.1, unbiased=True)
        >>> state.gamma, state.variance
        (array([1., 1.], dtype=float32), array([4., 9.], dtype=float32))
    """

    gamma: Vector | None
    beta: Vector | None
    mean: Vector
    variance: Vector
    epsilon: float
    momentum: float | None
    unbiased: bool

    def __post_init__(self) -> None:
        for name in ("gamma", "beta", "mean", "variance"):
            object.__setattr__(self, name, _vector(name, getattr(self, name), optional=name in ("gamma", "beta")))
        for name in ("gamma", "beta", "variance"):
            vector = getattr(self, name)
            if vector is not None and vector.shape != self.mean.shape:
                raise ValueError(f"expected a {name} of the mean's {self.mean.size} channels. Received: {vector.size} values")
        if (self.variance < 0).any():
            raise ValueError(f"expected a variance of at least 0. Received: {self.variance.min()}")
        for name, at_most in (("epsilon", np.inf), ("momentum", 1)):
            value = getattr(self, name)
            if value is None and name == "momentum":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
                raise TypeError(f"expected a number for {name}. Received: {value!r}")
            if not 0 <= value <= at_most:
                raise ValueError(
                    f"expected {name} to be {'between 0 and 1' if at_most == 1 else 'at least 0'}. Received: {value}"
                )
            object.__setattr__(self, name, float(value))
        if not isinstance(self.unbiased, bool | np.bool_):
            raise TypeError(f"expected a bool for unbiased. Received: {self.unbiased!r}")
        object.__setattr__(self, "unbiased", bool(self.unbiased))

    def fitted(self, channels: int, gamma: bool, beta: bool, layer: str) -> tuple[Vector | None, Vector | None]:
        """Gamma and beta for a layer that has them or not.

        Args:
            channels: the layer's number of channels.
            gamma: whether it has a gamma.
            beta: whether it has a beta.
            layer: what errors call it.

        Returns:
            ``(gamma, beta)``, None for what the layer has not, ones and zeros for what the state has not.

        Raises:
            ValueError: another number of channels; the layer has not what the state needs.
        """
        if self.mean.size != channels:
            raise ValueError(f"{layer} has {channels} channels. Received: a state of {self.mean.size}")
        vectors: list[Vector | None] = []
        for name, value, wanted, neutral in (("gamma", self.gamma, gamma, 1), ("beta", self.beta, beta, 0)):
            if wanted:
                vectors.append(np.full(channels, neutral, np.float32) if value is None else value)
                continue
            if value is not None and not (value == neutral).all():
                raise ValueError(f"{layer} has no {name}, so it cannot hold the state's. Received: {name}={value}")
            vectors.append(None)
        return vectors[0], vectors[1]


def from_caffe(
    mean: ArrayLike,
    variance: ArrayLike,
    scale_factor: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    epsilon: float = 1e-5,
) -> BatchNormState:
    """The state in the blobs of Caffe's ``BatchNorm`` layer, and of the ``Scale`` layer after it.

    Caffe stores sums and what to divide them by; where that is 0, nothing has been averaged yet and its code takes 0 for both
    statistics. Its variance is the unbiased one. Momentum is Caffe's default, a ``moving_average_fraction`` of 0.999.

    Args:
        mean: the first blob of ``BatchNorm``, shape ``(C,)``.
        variance: the second, shape ``(C,)``.
        scale_factor: the third, one number.
        gamma: the first blob of ``Scale``; None without one.
        beta: the second blob of ``Scale``; None without a bias (``bias_term: false``).
        epsilon: ``batch_norm_param.eps``.

    Returns:
        The state.

    Raises:
        TypeError, ValueError: as ``BatchNormState``; a scale factor that is not one finite number of at least 0.

    Example:
        >>> from_caffe([2.0, 4.0], [8.0, 2.0], scale_factor=2.0).variance
        array([4., 1.], dtype=float32)
    """
    factor = _numbers("scale_factor", scale_factor)
    if factor.size != 1 or not np.isfinite(factor).all() or factor.reshape(()) < 0:
        raise ValueError(f"expected one finite scale_factor of at least 0. Received: {scale_factor!r}")
    total = float(factor.reshape(()))
    sums = (_numbers("mean", mean), _numbers("variance", variance))
    a, b = (np.zeros_like(s) if total == 0 else s / total for s in sums)
    return BatchNormState(gamma, beta, a, b, epsilon, CAFFE_MOMENTUM, unbiased=True)  # type: ignore[arg-type]


def complement(momentum: float) -> float:
    """``1 - momentum`` as people write it: 0.1 for 0.9 and back, which floats would make 0.09999999999999998.

    PyTorch's momentum is the weight of the new batch and Keras's that of the old statistics.

    Example:
        >>> complement(0.99), complement(0.01)
        (0.01, 0.99)
    """
    return float(1 - Decimal(repr(float(momentum))))


def scale_and_shift(
    gamma: ArrayLike | None, beta: ArrayLike | None, mean: ArrayLike, variance: ArrayLike, epsilon: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Batch norm with stored statistics as ``scale * x + shift``, in float64.

    Args:
        gamma, beta: of each channel, or None.
        mean, variance: of each channel.
        epsilon: added to the variance.

    Returns:
        ``(scale, shift)``, ``gamma / sqrt(variance + epsilon)`` and ``beta - scale * mean``.

    Example:
        >>> scale_and_shift([3.0], [1.0], [2.0], [9.0], epsilon=0.0)
        (array([1.]), array([-1.]))
    """
    mean = np.asarray(mean, np.float64)
    scale = (1.0 if gamma is None else np.asarray(gamma, np.float64)) / np.sqrt(np.asarray(variance, np.float64) + epsilon)
    return scale, (0.0 if beta is None else np.asarray(beta, np.float64)) - scale * mean


def _numbers(name: str, value: object) -> NDArray[np.float64]:
    array = np.asarray(value)
    # What numpy has no letter for (bfloat16) is of kind V.
    if array.dtype.kind not in "fiu" and "float" not in array.dtype.name:
        raise TypeError(f"expected real numbers for {name}. Received: {array.dtype} {type(value).__name__}")
    return array.astype(np.float64)


def _vector(name: str, value: object, optional: bool) -> Vector | None:
    if value is None and optional:
        return None
    array = _numbers(name, value)
    if array.ndim != 1:
        raise ValueError(f"expected a vector of one value per channel for {name}. Received: shape {array.shape}")
    return array.astype(np.float32)
