"""Compare by digests the values that must be equal on all ranks; both adapters build `check_ranks_agree` on this module."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE = "learning rate"
HYPERPARAMETERS = "hyperparameters"
LAYER_STATE = "layer state"
WEIGHT = "weight"
OPTIMIZER_STATE = "optimizer state"
STATISTICS = "running statistics"
OTHER = "buffer"

CAUSES = {
    LEARNING_RATE: "A callback or scheduler set it from this rank's own metric, or runs on some ranks only. Average the "
    "metric first, and use the same callbacks and schedulers on every rank.",
    HYPERPARAMETERS: "Create the optimizer with the same arguments on every rank, and load the same file into it.",
    LAYER_STATE: "The ranks adapted the layer to different data. Adapt it on one rank and broadcast the model.",
    WEIGHT: "Usual causes: the initial values were not broadcast; the optimizer does not average gradients; some ranks "
    "loaded or restored other weights (`restore_best_weights` with this rank's own metric).",
    OPTIMIZER_STATE: "Usual causes: it was loaded on some ranks only and not broadcast; the ranks have made different numbers "
    "of steps.",
    STATISTICS: "Usual causes: they were loaded on some ranks only and not broadcast; some ranks ran the layer in "
    "training mode more often.",
    OTHER: "Broadcast it from one rank, or pass it in `local` if it differs between ranks by design.",
}
_MAY_BE_ROUNDING = (
    "This may be rounding (the order in which sparse gradients are added on GPUs varies; different processors round "
    "differently). Broadcast the model from time to time."
)

# 64-bit words are summed over the rows of each block, and the sums are hashed. This detects every change of one word, and
# every swap of two words except in one column of one block. 251 is prime, so swapped rows or channels of a weight are detected.
_COLUMNS, _ROWS = 251, 64
# The largest difference, relative to the largest value, that rounding explains. Averaged gradients keep it from growing.
_ROUNDING = 1e-3


class Entry(NamedTuple):
    """One value that must be equal on all ranks."""

    kind: str
    """One of the constants above."""
    name: str
    value: Any
    """A NumPy array of a built-in dtype, or a value that its `repr` identifies."""
    ranks: tuple[int, ...] | None = None
    """The ranks that must agree; None for all."""


class Difference(NamedTuple):
    """The first difference between the ranks."""

    message: str
    is_fault: bool
    """Whether it must be an error: neither rounding nor a buffer that may differ between ranks explains it."""


def find_difference(
    entries: Callable[[], Iterable[Entry]], rank: int, ranks: Sequence[int], gather: Callable[[Any], list[Any]]
) -> Difference | None:
    """Return the first difference between the ranks' values, or None. All ranks get the same result.

    A difference that must be an error comes before one that may have another cause.

    Args:
        entries: Function that lists the values of this rank, in the same order on all ranks.
        rank: This rank.
        ranks: All participating ranks.
        gather: Function that returns the values of all of them, in the order of `ranks`.
    """
    own = [(entry.kind, entry.ranks, digest(entry.value)) for entry in entries()]
    everyone = gather([found[1:] for found in own])
    if len({len(others) for others in everyone}) > 1:
        counts = gather(dict(Counter(kind for kind, *_ in own)))
        kinds = sorted({kind for count in counts for kind in count if len({other.get(kind) for other in counts}) > 1})
        received = "; ".join(f"{kind}: {[count.get(kind, 0) for count in counts]}" for kind in kinds)
        message = (
            "the ranks have drifted apart: they hold different numbers of values. "
            f"Received: by rank, {received}. Create the same model and optimizer on every rank."
        )
        return Difference(message, is_fault=True)
    # The ranks that must agree on an entry are those that pass the same `ranks` for it.
    differing = [len(set(by_rank)) > len({scope for scope, _ in by_rank}) for by_rank in zip(*everyone, strict=True)]
    first = None
    for i, entry in enumerate(entries() if any(differing) else ()):
        if differing[i]:
            by_rank = [others[i] for others in everyone]
            difference = _describe(entry, by_rank, rank, ranks, gather, sum(differing) - 1)
            first = first or difference
            if difference is not None and difference.is_fault:
                return difference
    return first


def digest(value: Any) -> bytes:
    """Return a 16-byte digest, equal for equal values in the same memory layout, at memory bandwidth for arrays."""
    if not isinstance(value, np.ndarray) or value.dtype.hasobject:
        text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
        return hashlib.blake2b(text.encode(), digest_size=16).digest()
    order = sorted(range(value.ndim), key=lambda axis: -value.strides[axis])
    data = np.ascontiguousarray(value.transpose(order)).reshape(-1).view(np.uint8)
    words = data[: data.size // (8 * _COLUMNS) * 8 * _COLUMNS].view(np.uint64).reshape(-1, _COLUMNS)
    whole = len(words) // _ROWS * _ROWS
    found = hashlib.blake2b(f"{value.dtype.str} {value.shape} {order}".encode(), digest_size=16)
    found.update(np.add.reduce(words[:whole].reshape(-1, _ROWS, _COLUMNS), axis=1).data)
    found.update(np.add.reduce(words[whole:], axis=0).data)
    found.update(data[words.nbytes :].data)
    return found.digest()


def _describe(
    entry: Entry,
    by_rank: list[tuple[tuple[int, ...] | None, bytes]],
    rank: int,
    ranks: Sequence[int],
    gather: Callable[[Any], list[Any]],
    others: int,
) -> Difference | None:
    """Return the ranks that differ from the first rank of their group, and by how much.

    Returns:
        None if only the memory layouts differ.
    """
    members = next(m for m in _scopes(by_rank) if len({by_rank[i] for i in m}) > 1)
    reference = gather(entry.value if rank == ranks[members[0]] else None)[members[0]]
    same = isinstance(entry.value, np.ndarray) and _bits(entry.value) == _bits(reference)
    is_float = isinstance(entry.value, np.ndarray) and entry.value.dtype.kind == "f"
    everyone = gather((entry.kind, entry.name, _text(entry.value), same, is_float, _distance(entry.value, reference)))
    kind, name, _, _, is_float, _ = everyone[members[0]]
    different = [i for i in members if not everyone[i][3]]
    if not different:
        return None
    distances = [everyone[i][5] for i in different]
    texts: dict[str, list[int]] = {}
    for i in members:
        texts.setdefault(everyone[i][2], []).append(ranks[i])
    if len(texts) > 1 or None in distances:
        received = "; ".join(f"{text} on {_ranks(those)}" for text, those in texts.items())
    else:
        differ = f"{_ranks([ranks[i] for i in different])} {'differs' if len(different) == 1 else 'differ'}"
        received = f"{differ} from rank {ranks[members[0]]} by up to {max(d for d, _ in distances):.3g}"
        received += f", where values are up to {distances[0][1]:.3g}"
    is_rounding = (
        kind in (WEIGHT, OPTIMIZER_STATE)
        and is_float
        and None not in distances
        and all(difference <= _ROUNDING * largest for difference, largest in distances)
    )
    more = f" (and {others} more {'value' if others == 1 else 'values'})" if others else ""
    message = f"the ranks have drifted apart: {kind} {name!r}{more} is not the same on all of them. Received: {received}. " + (
        _MAY_BE_ROUNDING if is_rounding else CAUSES[kind]
    )
    return Difference(message, is_fault=kind != OTHER and not is_rounding)


def _scopes(by_rank: list[tuple[tuple[int, ...] | None, bytes]]) -> list[list[int]]:
    """Return the positions of the ranks that must agree, one list for each value of `Entry.ranks`."""
    scopes: dict[Any, list[int]] = {}
    for i, (scope, _) in enumerate(by_rank):
        scopes.setdefault(scope, []).append(i)
    return list(scopes.values())


def _bits(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    return value.dtype.str, value.shape, value.tobytes()


def _distance(value: Any, reference: Any) -> tuple[float, float] | None:
    """Return the largest difference and the largest value of two arrays; None unless shapes and dtypes are equal."""
    if not isinstance(value, np.ndarray) or not isinstance(reference, np.ndarray):
        return None
    if value.shape != reference.shape or value.dtype != reference.dtype or value.dtype.kind not in "biufc":
        return None
    wide = np.complex128 if value.dtype.kind == "c" else np.float64
    here, there = value.astype(wide), reference.astype(wide)
    equal = (here == there) | (np.isnan(here) & np.isnan(there))
    with np.errstate(invalid="ignore"):
        return float(np.abs(np.where(equal, 0.0, here - there)).max()), float(np.abs(there).max())


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return str(value.reshape(-1)[0]) if value.size == 1 else f"{value.dtype} of shape {value.shape}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"
