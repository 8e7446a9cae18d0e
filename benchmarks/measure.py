"""What every section shares: timing in turns, quartiles, and the shape of what is measured."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hvd_syncbn.horovod import FRAMEWORKS as FRAMEWORKS

EPS = 1e-5  # of every layer here

# Seconds of one call's parts: (forward, backward), or one number where a framework has one program for both.
Step = Callable[[], tuple[float, ...]]
Times = dict[str, list[list[float]]]  # contestant -> rounds -> parts
Record = dict[str, Any]


class Framework(Protocol):
    """What a section asks of a framework. `with_torch` and `with_tensorflow` give it."""

    threads: int
    rank: int
    layout: str
    """That of its networks."""
    depth: int
    """Layers in one step of `chain`: what a graph's call costs is shared by its layers."""
    local: tuple[str, ...]
    """Contestants that know no other rank: the framework's own layer, and ours."""
    synchronized: tuple[str, ...]
    """Contestants on several ranks."""
    engines: tuple[str, ...]
    """What can sum packets, the tuned one first."""

    def barrier(self) -> None:
        """Returns when every rank is here."""

    def shutdown(self) -> None:
        """Leaves Horovod: `mpirun` takes a process that has not for one that failed."""

    def step(self, name: str, shape: tuple[int, ...], layout: str, dtype: str) -> Step:
        """One forward and backward of a contestant's layer on random values; `shape` is (N, C, ...) in either layout."""

    def chain(self, name: str, shape: tuple[int, ...]) -> Step:
        """The same of `depth` layers, one after the other."""

    def allreduce(self, words: int, engine: str = "horovod") -> Step:
        """A bare allreduce of int64 words, once for each direction, by one of `engines`."""

    def network(self, name: str, images: int, size: int) -> Step:
        """Forward and backward of a ResNet-50 whose batch norms are a contestant's layers."""

    def normalize(
        self, name: str, x: NDArray[np.float32], gamma: NDArray[np.float32], beta: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The output in training of a new layer with these parameters, channels first."""


class FrameworkThatTrains(Framework, Protocol):
    """What only PyTorch's is asked for."""

    def training(self, name: str, images: int, size: int) -> Step:
        """Like `network`, and an optimizer's step that averages all gradients over the ranks."""

    def saved(self, name: str, shape: tuple[int, ...], relu: bool) -> dict[str, int]:
        """Bytes that a layer's forward (and a relu) keeps for its backward, by what they are."""


WHOLE_BATCH = ("ours alone", "local")  # contestants whose accuracy is that of one process


LABELS = {
    "torch": {"local": "F.batch_norm", "horovod": "hvd.SyncBatchNorm"},
    "tensorflow": {"local": "Keras BatchNormalization", "horovod": "hvd.SyncBatchNormalization (tf_keras)"},
}


def label(framework: str, name: str) -> str:
    """A contestant's name for a person."""
    other = {
        "synchronized": "Keras synchronized=True",
        "allreduce": "bare allreduce",
        "allreduce, torch.distributed": "bare allreduce of torch.distributed",
    }
    return LABELS[framework].get(name) or other.get(name, name)


def sizes(shape: Sequence[int]) -> str:
    """A shape for a person."""
    return "x".join(map(str, shape))


class Spread(NamedTuple):
    """A median with its quartiles."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.middle)} ({number(self.low)}-{number(self.high)})"


def spread(values: list[float]) -> Spread:
    """The quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, middle, high)


def number(value: float) -> str:
    """Three digits, as a person writes them."""
    if value == 0 or not np.isfinite(value):
        return str(value)
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - int(np.floor(np.log10(abs(value)))))}f}"


def one_line(error: BaseException) -> str:
    """An error for a table."""
    text = re.sub(r"\{\{.*?\}\} ?", "", str(error)).strip()  # TensorFlow's numbered nodes
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"[:300]


def timed(function: Callable[[], object]) -> Step:
    """Of anything."""

    def step() -> tuple[float]:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start,)

    return step


def attempt(make: Mapping[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, str]]:
    """Makes every contestant and calls it twice (programs are traced, caches filled); what failed is a result, too."""
    steps: dict[str, Step] = {}
    errors: dict[str, str] = {}
    for name, maker in make.items():
        try:
            step = maker()
            step()
            step()
            steps[name] = step
        except Exception as error:
            errors[name] = one_line(error)
    return steps, errors


def rounds(steps: dict[str, Step], errors: dict[str, str], count: int, before: Callable[[], None] = lambda: None) -> Times:
    """Calls everything once per round, so a machine that changes its speed changes it for all; `errors` gets what fails."""
    times: Times = {name: [] for name in steps}
    for _ in range(count):
        for name in list(times):
            before()
            try:
                times[name].append(list(steps[name]()))
            except Exception as error:
                errors[name] = one_line(error)
                del times[name]
    return times


def slowest(ranks: list[Times]) -> Times:
    """A job is as fast as its slowest rank, round by round."""
    return {
        name: [
            [max(parts) for parts in zip(*together, strict=True)] for together in zip(*(t[name] for t in ranks), strict=True)
        ]
        for name in ranks[0]
        if all(name in times for times in ranks)
    }


def total(times: Times, name: str) -> list[float]:
    """Seconds of a contestant's whole calls."""
    return [sum(parts) for parts in times[name]]


def ratios(numerator: list[float], denominator: list[float]) -> Spread:
    """Of the same rounds, then their quartiles: what slows a round down slows both."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])
