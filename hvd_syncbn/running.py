"""How running statistics move: the value that layers pass to the operators of both adapters."""

from __future__ import annotations

from typing import Any, NamedTuple


class Running(NamedTuple):
    """Running statistics of a layer, and how a batch changes them (docs/protocol.md, 3)."""

    mean: Any
    """A vector; None keeps no statistics."""
    var: Any
    """As ``mean``."""
    batches: Any
    """The number of batches before this one, an int64 scalar; None if it is not counted."""
    old_weight: float
    """Weight of the old statistics: ``1 - momentum`` in PyTorch, ``momentum`` in Keras, 1 for the average over all batches."""
    new_weight: float | None
    """Weight of the batch. None derives both weights from ``batches``: an average in which the initial values do not count."""
    unbiased: bool
    """Whether the variance is ``var * n / (n - 1)`` (PyTorch) or ``var`` (Keras)."""
    skip_nonfinite: bool = True
    """Whether a channel that is not finite in the batch keeps its running statistics; otherwise they become NaN."""


WITHOUT_STATISTICS = Running(None, None, None, 1.0, 0.0, unbiased=True)
"""The value for a call that keeps no running statistics."""
