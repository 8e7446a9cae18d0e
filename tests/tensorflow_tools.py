"""What the TensorFlow tests share: one training step and its results, how bytes are compared, the stack of vectors.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hvd_syncbn.tensorflow import sync_batch_norm
from tests.arrays import NUMPY, same_bits

LAYOUTS = ("channels_first", "channels_last")
AXIS = {"channels_first": 1, "channels_last": -1}


class Step(NamedTuple):
    """What a training step takes."""

    x: Any
    dy: Any
    gamma: Any
    beta: Any
    mean: Any
    variance: Any
    residual: Any = None
    mask: Any = None

    @property
    def state(self) -> tuple[Any, ...]:
        return self.gamma, self.beta, self.mean, self.variance

    def part(self, samples: Any) -> Step:
        """The same of some samples."""
        batch = {name: None if getattr(self, name) is None else getattr(self, name)[samples] for name in self._batch}
        return self._replace(**batch)

    @property
    def _batch(self) -> tuple[str, ...]:
        return "x", "dy", "residual", "mask"


def step(shape: tuple[int, ...], axis: int = -1, dtype: str = "float32", seed: int = 0, parameters: str = "float32") -> Step:
    """Random data, the same in every process."""
    rng = np.random.default_rng(seed)
    x, dy, residual = (rng.standard_normal(shape).astype(NUMPY[dtype]) for _ in range(3))
    gamma, beta, mean, variance = (rng.standard_normal(shape[axis]).astype(NUMPY[parameters]) for _ in range(4))
    # Not every numpy keeps 16 bits beside Python's numbers.
    return Step((x * 3 + 1).astype(x.dtype), dy, gamma, beta, mean, (variance**2).astype(variance.dtype), residual)


def train(data: Step, **options: Any) -> list[NDArray[Any]]:
    """Outputs, new moving statistics and all gradients."""
    x = tf.constant(data.x)
    optional = [tf.constant(t) for t in (data.gamma, data.beta, data.residual) if t is not None]
    with tf.GradientTape() as tape:
        tape.watch([x, *optional])
        rest = iter(optional)
        gamma, beta, residual = (None if t is None else next(rest) for t in (data.gamma, data.beta, data.residual))
        results = sync_batch_norm(
            x, gamma, beta, data.mean, data.variance, training=True, residual=residual, mask=data.mask, **options
        )
    return [*results, *tape.gradient(results[0], [x, *optional], output_gradients=tf.constant(data.dy))]


def in_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a graph."""
    graph: Callable[..., Any] = tf.function(function, autograph=False)
    return graph


def assert_same_bits(got: Sequence[Any], expected: Sequence[Any]) -> None:
    """Equal bytes, one by one."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert same_bits(a, b), f"result {i} differs:\n{np.asarray(a)}\nexpected\n{np.asarray(b)}"
