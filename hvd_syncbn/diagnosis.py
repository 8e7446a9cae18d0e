"""A diagnosis of a model's batch norms: the part of ``diagnose`` that both frameworks share."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hvd_syncbn import native, population
from hvd_syncbn.population import Network, Ranks, Vector

SYNCHRONIZED, LOCAL, FROZEN = "synchronized", "local", "frozen"

MOVED = population.MOVED  # standard deviations
RATIO = 1.25  # of variances, or its inverse
LEFT = 0.01  # weight of the initial statistics


@dataclass(frozen=True)
class Facts:
    """What an adapter knows about a batch norm without data."""

    name: str
    kind: str
    """``SYNCHRONIZED``, ``LOCAL`` (statistics of this rank alone in training) or ``FROZEN``."""
    collective: str | None
    """The name of the collectives of a synchronized layer."""
    updates: int | None
    """Training steps so far; None if they are not counted."""
    new_weight: float | None
    """Weight of a batch in the running statistics; None if they are an average without bias."""
    nonfinite_batches: int
    """Training steps of a synchronized layer with NaN or infinite channels."""


@dataclass(frozen=True)
class LayerDiagnosis:
    """What ``diagnose`` found about a layer. Values of channels are None without data, and for layers that it did not reach."""

    name: str
    """Path of the layer in the model."""
    kind: str
    """``"synchronized"``, ``"local"`` (statistics of one rank alone in training) or ``"frozen"``."""
    updates: int | None
    """Training steps so far; None if they are not counted."""
    initial_weight: float | None
    """Weight that the initial values 0 and 1 still have in the running statistics; None if unknown."""
    nonfinite_statistics: int
    """Channels whose running mean or variance is NaN or infinite."""
    differing_ranks: tuple[int, ...]
    """Ranks whose running statistics differ from those that most ranks have."""
    shift: NDArray[np.float64] | None = None
    """By channel, the distance of the running mean from the mean of the data, in standard deviations of the data."""
    ratio: NDArray[np.float64] | None = None
    """By channel, the running variance divided by the variance of the data."""
    nonfinite_data: int = 0
    """Channels with NaN or infinite inputs."""
    nonfinite_batches: int = 0
    """Training steps in which channels of a synchronized layer were NaN or infinite, since this process started. They did not
    change the running statistics of these channels, unless ``skip_nonfinite`` is False."""
    dead: int = 0
    """Channels in which all inputs are equal."""

    @property
    def is_off(self) -> bool:
        """Whether the running statistics are not those of the data."""
        return self.mean_shift > MOVED or not 1 / RATIO <= self.mean_ratio <= RATIO

    @property
    def mean_shift(self) -> float:
        """The mean of ``shift`` over the channels; 0 without data."""
        return _mean(self.shift, 0.0)

    @property
    def mean_ratio(self) -> float:
        """The geometric mean of ``ratio`` over the channels; 1 without data."""
        with np.errstate(divide="ignore"):
            return float(np.exp(_mean(None if self.ratio is None else np.log(self.ratio), 0.0)))


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found, the same on every rank. ``print`` shows a table and what to do; ``plot`` draws a picture."""

    layers: tuple[LayerDiagnosis, ...]
    """The model's batch norms, in its order."""
    advice: tuple[str, ...]
    """What to do, most important first."""

    def __str__(self) -> str:
        """Return the table and the advice as text."""
        text = io.StringIO()
        console = Console(file=text, width=1000)  # no line is broken
        console.print(self._table())
        for number, line in enumerate(self.advice, 1):
            console.print(f"{number}. {line}", highlight=False, markup=False)
        return text.getvalue().rstrip()

    def _table(self) -> Table:
        table = Table(title="batch norms: running statistics against those of the data")
        columns = ("layer", "kind", "updates", "initial weight", "mean off by (std)", "variance ratio", "channels")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if 2 <= i <= 5 else "left")
        for layer in self.layers:
            measured = layer.shift is not None
            table.add_row(
                layer.name,
                layer.kind,
                "" if layer.updates is None else str(layer.updates),
                "" if layer.initial_weight is None else f"{layer.initial_weight:.2g}",
                f"{layer.mean_shift:.2g}" if measured else "",
                f"{layer.mean_ratio:.2g}" if measured else "",
                ", ".join(_channels(layer)),
            )
        return table

    def plot(self) -> Any:
        """Draw the distance of the means and the ratio of the variances, a dot per channel, and return a Matplotlib figure.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        measured = [layer for layer in self.layers if layer.shift is not None and layer.ratio is not None]
        figure = Figure(figsize=(9, 1.5 + 0.3 * max(len(measured), 4)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for row, layer in enumerate(measured):
            assert layer.shift is not None and layer.ratio is not None
            color = "tab:red" if layer.is_off else "tab:green"
            for axes, values in ((left, layer.shift), (right, layer.ratio)):
                found = values[np.isfinite(values) & (values > 0)]
                axes.plot(found, np.full(found.size, row), ".", color=color, alpha=0.5)
        for axes, label, good in (
            (left, "running mean - mean of the data (standard deviations)", (0, MOVED)),
            (right, "running variance / variance of the data", (1 / RATIO, RATIO)),
        ):
            axes.set(xscale="log", xlabel=label, ymargin=0.2)
            axes.axvspan(*good, color="tab:green", alpha=0.15)
        left.set_yticks(range(len(measured)), [layer.name for layer in measured])
        left.invert_yaxis()
        return figure


def diagnose(
    ranks: Ranks,
    facts: Callable[[], Sequence[Facts]],
    prepare: Callable[[], Network],
    statistics: Callable[[], Sequence[Sequence[Vector]]],
    batches: Iterable[Any] | None,
    progress: bool,
    advice: Advice,
) -> Diagnosis:
    """Compare the running statistics of a model's batch norms with those of a pass over data.

    Args:
        ranks: the ranks that share the data.
        facts: function that returns what is known of each batch norm, in the model's order.
        prepare: function that returns the network of those whose inputs can be observed, by the same names.
        statistics: function that returns the running mean and variance of each batch norm; an empty list without any.
        batches: this rank's batches; None for a diagnosis without data.
        progress: whether the first rank shows a progress bar.
        advice: the framework's words for remedies.

    Raises:
        ValueError: the ranks have different models, or the data has too few values.
        RuntimeError: another rank failed.
    """
    everyone = population.together(ranks, lambda: [(fact.name, fact.kind, fact.collective) for fact in facts()], "diagnose")
    for other, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise ValueError(
                "the ranks disagree: the batch norms of the model must be the same on every rank. "
                f"Received: {_difference(everyone[0], theirs)} (rank 0 and rank {other})"
            )
    found = facts()
    vectors = statistics()
    digests = ranks.gather([hashlib.sha256(b"".join(v.tobytes() for v, _ in pair)).hexdigest() for pair in vectors])
    measured = {} if batches is None else _measure(ranks, prepare, batches, progress)
    layers = []
    for i, (fact, pair) in enumerate(zip(found, vectors, strict=True)):
        mine = [digest[i] for digest in digests]
        common = Counter(mine).most_common(1)[0][0]
        # A frozen layer keeps what it has, and a local one differs by design until the model is broadcast.
        differing = tuple(rank for rank, digest in enumerate(mine) if digest != common)
        running = [population.floats(vector) for vector in pair]
        wrong = ~np.isfinite(running).all(0) if running else np.zeros(0, bool)
        values = _compared(running, *measured[fact.name]) if fact.name in measured and running else {}
        layers.append(
            LayerDiagnosis(
                fact.name,
                fact.kind,
                fact.updates,
                _initial_weight(fact),
                int(wrong.sum()),
                differing,
                nonfinite_batches=fact.nonfinite_batches,
                **values,
            )
        )
    # The numbers of updates may differ between ranks: all show those of the first one.
    shown, known = ranks.gather((tuple(layers), tuple(found)))[0]
    return Diagnosis(shown, tuple(_advice(shown, known, batches is not None, advice)))


@dataclass(frozen=True)
class Advice:
    """A framework's words for remedies."""

    broadcast: str
    convert: str
    recalibrate: str
    rename: str
    momentum: Callable[[float], str]
    """From a weight of a batch in the running statistics."""


def _measure(
    ranks: Ranks, prepare: Callable[[], Network], batches: Iterable[Any], progress: bool
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]]:
    """Return mean and variance of the data, and its values that are not finite, by layer and channel."""
    made: list[Network] = []
    population.together(ranks, lambda: made.append(prepare()), "diagnose")
    network = made[0]
    bar = population.track_as("diagnose", progress and ranks.rank == 0)
    totals, _, _ = population.measure(network, batches, ranks, "batches", bar, "diagnose")
    measured = {}
    for layer, total in zip(network.layers, totals, strict=True):
        if total[1]:
            mean, variance = (np.zeros(layer.channels) for _ in range(2))
            native.population(total, native.BATCHES, layer.unbiased, layer.eps, (mean, "float64"), (variance, "float64"))
            measured[layer.name] = mean, variance, total[native.HEADER : native.HEADER + layer.channels]
    return measured


def _compared(
    running: Sequence[NDArray[np.float64]],
    mean: NDArray[np.float64],
    variance: NDArray[np.float64],
    nonfinite: NDArray[np.int64],
) -> dict[str, Any]:
    with np.errstate(all="ignore"):
        shift, ratio = np.abs(running[0] - mean) / np.sqrt(variance), running[1] / variance
    dead = variance == 0
    shift[dead], ratio[dead] = np.nan, np.nan
    return {"shift": shift, "ratio": ratio, "nonfinite_data": int(np.count_nonzero(nonfinite)), "dead": int(dead.sum())}


def _initial_weight(fact: Facts) -> float | None:
    if fact.updates is None:
        return None
    if fact.new_weight is None:
        return 0.0 if fact.updates else 1.0
    return float((1 - fact.new_weight) ** fact.updates)


def _channels(layer: LayerDiagnosis) -> list[str]:
    counts = {
        "NaN or infinite statistics": layer.nonfinite_statistics,
        "NaN or infinite inputs": layer.nonfinite_data,
        "dead": layer.dead,
    }
    texts = [f"{count} {what}" for what, count in counts.items() if count]
    if layer.nonfinite_batches:
        texts.append(f"NaN or infinite in {layer.nonfinite_batches} training steps")
    if layer.differing_ranks:
        texts.append(f"differ on ranks {list(layer.differing_ranks)}")
    return texts


def _advice(layers: Sequence[LayerDiagnosis], facts: Sequence[Facts], has_data: bool, words: Advice) -> list[str]:
    lines = [
        f"{what.format(_some([layer.name for layer in chosen]))} {remedy}"
        for chosen, what, remedy in (
            (
                [layer for layer in layers if layer.differing_ranks],
                "The ranks have different running statistics in {}.",
                words.broadcast,
            ),
            ([layer for layer in layers if layer.kind == LOCAL], "These layers are not synchronized: {}.", words.convert),
            (_named_alike(layers, facts), "These layers share the name of a collective: {}.", words.rename),
            (
                [layer for layer in layers if layer.nonfinite_statistics],
                "Running statistics are NaN or infinite in {}, so evaluation is, too.",
                words.recalibrate,
            ),
            (
                [layer for layer in layers if layer.nonfinite_batches],
                "Channels of {} were NaN or infinite in some training steps.",
                "Check the loss scale, the learning rate and the data.",
            ),
            (
                [layer for layer in layers if layer.nonfinite_data],
                "The inputs of {} are NaN or infinite in some channels.",
                "Check the data and the weights.",
            ),
        )
        if chosen
    ]
    learning = [layer for layer in layers if layer.kind != FROZEN]
    early = [layer for layer in learning if layer.initial_weight is not None and layer.initial_weight > LEFT]
    if early:
        lines.append(_too_few_steps(early, facts, words))
    off = [layer for layer in learning if layer.is_off and layer not in early]
    if off:
        worst = max(off, key=lambda layer: layer.mean_shift)
        lines.append(
            f"The running statistics of {_some([layer.name for layer in off])} are not those of this data: the means of "
            f"{worst.name!r} are {worst.mean_shift:.2g} standard deviations off, the ratio of the variances is "
            f"{worst.mean_ratio:.2g}. Either the weights changed faster than the running averages follow, or the data differs "
            f"from the training data in preprocessing. {words.recalibrate}"
        )
    if dead := [layer.name for layer in layers if layer.dead]:
        lines.append(f"All inputs of a channel are equal (a dead filter or activation) in {_some(dead)}.")
    if has_data and (unreached := [layer.name for layer in learning if layer.shift is None]):
        lines.append(f"The data did not reach {_some(unreached)}, or they have no running statistics.")
    if lines:
        return lines
    if has_data:
        return [
            "The running statistics are those of this data. If evaluation is poor on other data, the model overfits, or the "
            "preprocessing differs."
        ]
    return ["Without data nothing wrong shows. Pass batches to compare the running statistics with."]


def _named_alike(layers: Sequence[LayerDiagnosis], facts: Sequence[Facts]) -> list[LayerDiagnosis]:
    counts = Counter(fact.collective for fact in facts if fact.collective is not None)
    return [layer for layer, fact in zip(layers, facts, strict=True) if fact.collective and counts[fact.collective] > 1]


def _too_few_steps(early: Sequence[LayerDiagnosis], facts: Sequence[Facts], words: Advice) -> str:
    worst = max(early, key=lambda layer: layer.initial_weight or 0.0)
    updates = worst.updates or 0
    hint = ""
    if updates > 1:  # one step would need a momentum without an average
        hint = f" With {words.momentum(1 - LEFT ** (1 / updates))} so many steps would have been enough."
    others = f" ({len(early)} layers are like that)" if len(early) > 1 else ""
    return (
        f"After {updates} steps the initial statistics 0 and 1 still have a weight of {worst.initial_weight:.2g} in layer "
        f"{worst.name!r}{others}: too few steps for this momentum. {words.recalibrate}{hint}"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} other layers"


def _difference(mine: Sequence[Any], theirs: Sequence[Any]) -> str:
    if len(mine) != len(theirs):
        return f"{len(mine)} and {len(theirs)} batch norms"
    return next(f"{a} and {b}" for a, b in zip(mine, theirs, strict=True) if a != b)


def _mean(values: NDArray[np.float64] | None, default: float) -> float:
    if values is None:
        return default
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else default
