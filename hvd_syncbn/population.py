"""Statistics of a data set: the part of ``recalibrate`` that both frameworks share. See docs/protocol.md, section 9.

The adapters implement ``Network`` (runs a model and gives access to its layers) and ``Ranks`` (the collectives). The core does
the arithmetic. An error on one rank ends the work on all ranks, so that no rank waits for one that failed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from hvd_syncbn import native
from hvd_syncbn.progress import track

T = TypeVar("T")
Words = NDArray[np.int64]
Vector = tuple[NDArray[Any], str]  # an array (16-bit floats as their bits) and its dtype
Take = Callable[[int, Words], Words | None]

ESTIMATORS = ("pooled", "batches")
MOVED = 0.05  # standard deviations; if a layer's statistics move further, later layers should be measured again
SPREAD = 1.25  # standard deviation of all values relative to that within batches; above this, the batches differ too much


@dataclass(frozen=True)
class Layer:
    """A batch norm layer whose stored statistics are replaced."""

    name: str
    channels: int
    eps: float
    unbiased: bool


class Ranks(Protocol):
    """The ranks that share the data."""

    rank: int

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of ranks."""

    def sum(self, words: Words, name: str) -> Words:
        """Return the sum over all ranks."""


class Network(Protocol):
    """A model whose batch norm layers are observed."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The observed layers; an ``index`` below is a position in this list."""

    def run(self, batch: Any, take: Take) -> None:
        """Run the model on a batch.

        Every use of a layer calls ``take`` with the layer's index and its input's closed packet. ``take`` returns the packet
        to normalize by, or None to normalize by the stored statistics.
        """

    def read(self, index: int) -> list[Vector]:
        """Return copies of a layer's mean and variance, and of gamma and beta if they are initialized, too."""

    def write(self, index: int, vectors: Sequence[Vector]) -> None:
        """Store vectors in the order of ``read``."""


def check_arguments(
    batches: Any, estimator: str | None, forward: Any, init_affine: bool, layer_by_layer: bool, arrays: Any
) -> None:
    """Raise if an argument of ``recalibrate`` is wrong; ``arrays`` are the framework's tensor types."""
    if estimator not in (None, *ESTIMATORS):
        raise ValueError(f"expected estimator to be None or one of {ESTIMATORS}. Received: {estimator!r}")
    if forward is not None and not callable(forward):
        raise TypeError(f"expected forward to be a function of the model and a batch. Received: {type(forward).__name__}")
    if isinstance(batches, (np.ndarray, str, bytes, Mapping, *arrays)) or not (
        hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    ):
        raise TypeError(
            "expected batches to be an iterable of batches: a list of tensors, a DataLoader or a tf.data.Dataset. For a single "
            f"batch pass [batch]. Received: {type(batches).__name__}"
        )
    if layer_by_layer and (estimator == "batches" or init_affine):
        raise ValueError(
            'layer_by_layer needs estimator="pooled" and no init_affine, because those other options need a single pass. '
            f"Received: estimator={estimator!r}, init_affine={init_affine}"
        )
    if layer_by_layer and isinstance(batches, Iterator):
        raise ValueError(
            "layer_by_layer reads the batches once for every layer. Pass a list, a DataLoader or a tf.data.Dataset. "
            f"Received: {type(batches).__name__}, which can be read only once"
        )


class _Stopped(Exception):
    """Another rank has failed."""


def together(ranks: Ranks, work: Callable[[], T], name: str = "recalibrate") -> list[T]:
    """Call ``work`` and return its results on all ranks, in the order of ranks.

    Raises:
        Exception: ``work`` failed on this rank.
        RuntimeError: ``work`` failed on another rank.
    """
    error, value = None, None
    try:
        value = work()
    except Exception as failure:
        error = failure
    # _Stopped follows from another rank's error, and only that error is reported.
    mine = None if error is None or isinstance(error, _Stopped) else f"{type(error).__name__}: {error}"
    everyone = ranks.gather((value, mine))
    if mine is not None and error is not None:
        raise error
    for rank, (_, text) in enumerate(everyone):
        if text is not None:
            raise RuntimeError(
                f"{name} failed on rank {rank}, so the model was not changed on any rank. Received from that rank: {text}"
            )
    return [value for value, _ in everyone]


def recalibrate(
    ranks: Ranks,
    prepare: Callable[[], Network],
    batches: Iterable[Any],
    estimator: str | None,
    init_affine: bool,
    layer_by_layer: bool,
    progress: bool,
) -> None:
    """Replace the statistics of a network's layers, or raise and restore them.

    Args:
        ranks: the ranks that share the data.
        prepare: function that checks this rank's arguments and returns its network.
        batches: this rank's batches.
        estimator: one of ``ESTIMATORS``. None means "pooled" with ``init_affine`` or ``layer_by_layer``, else "batches",
            which needs one pass and does not depend on the stored statistics.
        init_affine: whether gamma and beta are initialized, too.
        layer_by_layer: whether to repeat the pass until the statistics no longer change.
        progress: whether the first rank shows a progress bar.

    Raises:
        ValueError: the ranks disagree about the layers or arguments, or the data has too few values.
        RuntimeError: another rank failed.
    """
    if estimator is None:
        estimator = "pooled" if init_affine or layer_by_layer else "batches"
    made: list[Network] = []

    def agreed() -> Any:
        made.append(prepare())
        return made[0].layers, estimator, init_affine, layer_by_layer

    everyone = together(ranks, agreed)
    for other, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise ValueError(
                "the ranks disagree: layers, estimator, init_affine and layer_by_layer must be the same on every rank. "
                f"Received: {_difference(everyone[0], theirs)} (rank 0 and rank {other})"
            )
    network = made[0]
    before = [network.read(i) for i in range(len(network.layers))]
    shown = progress and ranks.rank == 0
    passes = len(network.layers) if layer_by_layer else 1
    try:
        for number in range(passes):
            description = f"recalibrate, pass {number + 1} of at most {passes}" if layer_by_layer else "recalibrate"
            totals, order, pooled = measure(network, batches, ranks, estimator, track_as(description, shown))
            old = [network.read(i) for i in range(len(network.layers))]
            new = _finish(network, totals, estimator, old)
            for i, vectors in enumerate(new):
                network.write(i, vectors)
            if all(_bytes(a) == _bytes(b) for a, b in zip(old, new, strict=True)):
                break
    except BaseException:
        for i, vectors in enumerate(before):
            network.write(i, vectors)
        raise
    _report(network, totals, order, before, new, estimator == "pooled" and not init_affine and not layer_by_layer)
    if estimator == "batches" and not init_affine:
        _report_spread(network, totals, pooled)


def track_as(description: str, shown: bool) -> Callable[[Iterable[T]], Generator[T]]:
    """Return ``track`` for batches, with their number as the total if it is known."""

    def bar(batches: Iterable[T]) -> Generator[T]:
        total = None
        with contextlib.suppress(TypeError):  # an IterableDataset's DataLoader, a tf.data.Dataset of unknown length
            total = len(batches) if isinstance(batches, Sized) else None
        return track(batches, description, shown, total)

    return bar


def _difference(mine: Any, theirs: Any) -> str:
    layers, other = mine[0], theirs[0]
    if len(layers) != len(other):
        return f"{len(layers)} and {len(other)} layers"
    for a, b in zip((*layers, mine[1:]), (*other, theirs[1:]), strict=True):
        if a != b:
            return f"{a} and {b}"
    return "equal arguments"  # not reached


class _Steps:
    """Lockstep over the batches of all ranks: one sum for every use of a layer, in which ranks without batches take part, too.

    A message is ``[active, index, index**2, failed, packet...]``, padded to the packet of the largest layer. So a rank without
    a batch can take part without knowing the next layer, and all ranks see at once if one has failed or uses another layer.
    """

    def __init__(self, layers: Sequence[Layer], ranks: Ranks) -> None:
        self.layers = layers
        self.ranks = ranks
        self.sizes = [native.packet_size(layer.channels) for layer in layers]
        self.over = False  # all ranks know that no message follows

    def message(self, index: int | None = None, packet: Words | None = None, failed: bool = False) -> tuple[int, Words] | None:
        """Exchange one message and return the layer's index and its reduced packet; None if no rank has a batch left."""
        words = np.zeros(4 + max(self.sizes), np.int64)
        words[3] = failed
        if index is not None and packet is not None:
            words[:3] = 1, index, index * index
            words[4 : 4 + len(packet)] = packet
        words = self.ranks.sum(words, "recalibrate.batch")
        active, sum_of_indices, squares, failures = words[:4].tolist()
        if failures:
            self.over = True
            raise _Stopped
        if not active:
            self.over = True
            return None
        common = sum_of_indices // active
        if (sum_of_indices, squares) != (active * common, active * common * common):
            self.over = True
            mine = "no layer" if index is None else repr(self.layers[index].name)
            raise ValueError(
                'with estimator="batches", the default, every rank must use the same layers in the same order. '
                f"Received: {mine} on this rank, another one on other ranks. If the model branches on its data, pass "
                "layer_by_layer=True"
            )
        return common, words[4 : 4 + self.sizes[common]]

    def leave(self, failed: bool, add: Callable[[int, Words], None]) -> None:
        """Take part until all ranks have finished, or report that this rank has failed."""
        if failed and not self.over:
            with contextlib.suppress(_Stopped):
                self.message(failed=True)
        while not self.over:
            step = self.message()
            if step is not None:
                add(*step)


def measure(
    network: Network,
    batches: Iterable[Any],
    ranks: Ranks,
    estimator: str,
    bar: Callable[[Iterable[Any]], Generator[Any]],
    name: str = "recalibrate",
) -> tuple[list[Words], list[int], list[Words]]:
    """Run one pass and return the layers' totals over all ranks, their order of use, and the totals of all values."""
    layers = network.layers
    totals, pooled = ([np.zeros(native.packet_size(layer.channels), np.int64) for layer in layers] for _ in range(2))
    steps = _Steps(layers, ranks)
    used: dict[int, None] = {}  # an ordered set

    def add_batch(index: int, reduced: Words) -> None:
        reduced = np.ascontiguousarray(reduced)
        if native.add_batch(reduced, totals[index]) == native.ONE_VALUE:
            steps.over = True  # true on every rank, because all have this packet
            raise ValueError(
                f"{_one_value(layers[index], 'a global batch')}. Drop that batch (often the last one: drop_last=True), or pass "
                "layer_by_layer=True"
            )
        native.add_packet(reduced, pooled[index])

    def take(index: int, packet: Words) -> Words | None:
        used[index] = None
        if estimator == "pooled":
            native.add_packet(packet, pooled[index])
            return None
        step = steps.message(index, packet)
        assert step is not None  # this rank is active
        add_batch(index, step[1])
        return step[1]

    def work() -> tuple[int, list[int]]:
        number = 0
        try:
            with contextlib.closing(bar(batches)) as tracked:
                for batch in tracked:
                    network.run(batch, take)
                    number += 1
        except Exception:
            if estimator == "batches":
                steps.leave(True, add_batch)
            raise
        if estimator == "batches":
            steps.leave(False, add_batch)
        return number, list(used)

    everyone = together(ranks, work, name)
    if not any(number for number, _ in everyone):
        raise ValueError("no rank has a batch. Pass batches on at least one rank. Received: batches without elements")
    if estimator == "pooled":
        totals = pooled = [ranks.sum(total, f"recalibrate.{layer.name}") for layer, total in zip(layers, pooled, strict=True)]
    return totals, max((order for _, order in everyone), key=len), pooled


def _one_value(layer: Layer, where: str) -> str:
    return f"expected more than 1 value per channel in {where}. Received: 1 over all ranks in layer {layer.name!r}"


def _finish(network: Network, totals: list[Words], estimator: str, old: list[list[Vector]]) -> list[list[Vector]]:
    """Return the layers' new vectors; a layer without values keeps its own."""
    new = []
    code = ESTIMATORS.index(estimator)
    for layer, total, vectors in zip(network.layers, totals, old, strict=True):
        changed = [(array.copy(), dtype) for array, dtype in vectors]
        if native.population(total, code, layer.unbiased, layer.eps, *changed) == native.ONE_VALUE:
            raise ValueError(_one_value(layer, "the data of all ranks"))
        new.append(changed)
    if not any(total[1] for total in totals):
        raise ValueError(
            "no batch reached a batch norm layer, or all batches were empty. Check that `forward` runs this model. "
            f"Received: layers {[layer.name for layer in network.layers]}"
        )
    return new


def _bytes(vectors: Sequence[Vector]) -> list[bytes]:
    return [array.tobytes() for array, _ in vectors]


def _report(
    network: Network,
    totals: list[Words],
    order: list[int],
    before: list[list[Vector]],
    after: list[list[Vector]],
    one_pass: bool,
) -> None:
    """Warn about unused layers, NaN, and layers that were measured behind wrong statistics."""
    unused = [layer.name for layer, total in zip(network.layers, totals, strict=True) if not total[1]]
    if unused:
        _warn(f"no batch reached these layers, so they keep their statistics: {unused}")
    bad = {
        layer.name: int(np.count_nonzero(total[native.HEADER : native.HEADER + layer.channels]))
        for layer, total in zip(network.layers, totals, strict=True)
    }
    if any(bad.values()):
        _warn(
            f"NaN, infinite or huge inputs: statistics are NaN in { ({k: v for k, v in bad.items() if v}) } channels by layer"
        )
    # No layer follows the last one.
    moved = {network.layers[i].name: _distance(before[i], after[i]) for i in order[:-1] if one_pass}
    worst = max(moved, key=lambda name: moved[name], default="")
    if moved and moved[worst] > MOVED:
        _warn(
            f"the statistics of layer {worst!r} moved by {moved[worst]:.2g} standard deviations, and later layers were "
            'measured with the old ones. Use estimator="batches" (the default; one pass, as in training) or '
            "layer_by_layer=True (one pass per layer; exact)"
        )


def _report_spread(network: Network, totals: list[Words], pooled: list[Words]) -> None:
    """Warn if batches are not random samples of the data (such as batches of one class), because their means are then wrong."""
    ratios: dict[str, float] = {}
    for layer, total, values in zip(network.layers, totals, pooled, strict=True):
        if total[1]:
            deviations = []
            for words, code in ((total, native.BATCHES), (values, native.POOLED)):
                mean, variance = (np.zeros(layer.channels) for _ in range(2))
                native.population(words, code, True, layer.eps, (mean, "float64"), (variance, "float64"))
                deviations.append(np.sqrt(variance + layer.eps))
            ratio = deviations[1] / deviations[0]
            ratios[layer.name] = float(np.mean(ratio[np.isfinite(ratio)])) if np.isfinite(ratio).any() else 1.0
    worst = max(ratios, key=lambda name: ratios[name])
    if ratios[worst] > SPREAD:
        _warn(
            f"the batches differ from each other: over all batches, the inputs of layer {worst!r} have {ratios[worst]:.2g} "
            "times the standard deviation that they have within a batch. Batch statistics are those of the data only if each "
            "batch is a random sample. Shuffle the data, or use layer_by_layer=True (one pass per layer; exact)"
        )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)  # the caller of the framework's recalibrate


def _distance(before: Sequence[Vector], after: Sequence[Vector]) -> float:
    """Return the Wasserstein distance of the normal distributions, averaged over channels, in standard deviations."""
    (old_mean, old_std), (mean, std) = ((floats(v[0]), np.sqrt(np.maximum(floats(v[1]), 0))) for v in (before, after))
    with np.errstate(all="ignore"):
        distance = np.hypot(mean - old_mean, std - old_std) / std
    known = distance[np.isfinite(mean) & (std > 0)]
    return float(np.nan_to_num(known, nan=np.inf).mean()) if known.size else 0.0


def floats(vector: Vector) -> NDArray[np.float64]:
    """Return a vector's values."""
    array, dtype = vector
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return (array.view(np.float16) if dtype == "float16" else array).astype(np.float64)
