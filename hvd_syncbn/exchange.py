"""The state of a batch norm layer as numpy arrays, to convert between frameworks and from Caffe.

This module imports no framework. ``get_state`` and ``set_state`` of ``hvd_syncbn.torch`` and ``hvd_syncbn.keras`` read and
write layers. docs/exchange.md lists the conventions in which the frameworks differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float32]

CAFFE_MOMENTUM = 0.001  # 1 - moving_average_fraction; Caffe's default is 0.999


@dataclass(frozen=True, eq=False)
class BatchNormState:
    """The state of a batch norm layer, independent of the framework.

    Vectors may be any array-like; they are rounded to float32.

    Args:
        gamma: scale of each channel, shape ``(C,)``; None (a scale of 1) if the layer has none.
        beta: offset of each channel, shape ``(C,)``; None (an offset of 0) if the layer has none.
        mean: running mean of each channel, shape ``(C,)``.
        variance: running variance of each channel, shape ``(C,)``.
        epsilon: added to the variance.
        momentum: weight of a new batch in the running statistics, as in PyTorch; None for the average over all batches.
        unbiased: whether the running variance averages ``n / (n - 1)`` times a batch's variance.

    Raises:
        TypeError: a value is not numeric.
        ValueError: vectors differ in length or have more than one dimension; a variance is negative; epsilon or momentum is
            out of range.

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
                raise ValueError(f"expected {name} to have {self.mean.size} values, as mean has. Received: {vector.size}")
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
        """Return gamma and beta for a layer.

        Args:
            channels: the layer's number of channels.
            gamma: whether the layer has a gamma.
            beta: whether the layer has a beta.
            layer: the layer's name in errors.

        Returns:
            ``(gamma, beta)``: None if the layer has none; ones or zeros if the layer has it and the state does not.

        Raises:
            ValueError: the number of channels differs, or the state has a gamma or beta that the layer cannot hold.
        """
        if self.mean.size != channels:
            raise ValueError(f"{layer} has {channels} channels. Received: a state of {self.mean.size} channels")
        vectors: list[Vector | None] = []
        for name, value, wanted, neutral in (("gamma", self.gamma, gamma, 1), ("beta", self.beta, beta, 0)):
            if wanted:
                vectors.append(np.full(channels, neutral, np.float32) if value is None else value)
                continue
            if value is not None and not (value == neutral).all():
                raise ValueError(
                    f"{layer} has no {name}, so it cannot hold the state. Create the layer with one. Received: {name}={value}"
                )
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
    """Return the state in the blobs of Caffe's ``BatchNorm`` layer and of the ``Scale`` layer after it.

    Caffe stores sums and their divisor. A divisor of 0 means that no batch has been averaged; as in Caffe, both statistics
    are then 0. The variance is unbiased. The momentum is Caffe's default, a ``moving_average_fraction`` of 0.999.

    Args:
        mean: the first blob of ``BatchNorm``, shape ``(C,)``.
        variance: the second, shape ``(C,)``.
        scale_factor: the third, one number.
        gamma: the first blob of ``Scale``; None without a ``Scale`` layer.
        beta: the second blob of ``Scale``; None without a bias (``bias_term: false``).
        epsilon: ``batch_norm_param.eps``.

    Returns:
        The state.

    Raises:
        TypeError: as ``BatchNormState``.
        ValueError: as ``BatchNormState``; ``scale_factor`` is not one finite number of at least 0.

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
    """Return ``1 - momentum`` in decimal: 0.1 for 0.9, where float arithmetic gives 0.09999999999999998.

    PyTorch's momentum is the weight of the new batch; Keras's is the weight of the old statistics.

    Example:
        >>> complement(0.99), complement(0.01)
        (0.01, 0.99)
    """
    return float(1 - Decimal(repr(float(momentum))))


def scale_and_shift(
    gamma: ArrayLike | None, beta: ArrayLike | None, mean: ArrayLike, variance: ArrayLike, epsilon: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ``scale * x + shift`` that equals batch norm with stored statistics, in float64.

    Args:
        gamma, beta: of each channel, shape ``(C,)``, or None.
        mean, variance: of each channel, shape ``(C,)``.
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
    # Types that numpy does not define, such as bfloat16, have kind V.
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
