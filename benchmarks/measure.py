"""Shared by all sections: timing in turns, quartiles, and the interface of a framework."""

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

# Returns seconds of one call: (forward, backward), or one number if a framework runs both as one program.
Step = Callable[[], tuple[float, ...]]
Times = dict[str, list[list[float]]]  # contestant -> rounds -> parts
Record = dict[str, Any]


class Framework(Protocol):
    """The interface of a framework, implemented by `with_torch` and `with_tensorflow`."""

    threads: int
    rank: int
    layout: str
    """The layout of its networks."""
    depth: int
    """Layers in one step of `chain`, which share the cost of a graph's call."""
    local: tuple[str, ...]
    """Contestants on one rank: the framework's own layer, and ours."""
    synchronized: tuple[str, ...]
    """Contestants on several ranks."""
    engines: tuple[str, ...]
    """The engines that can sum packets, the tuned one first."""

    def barrier(self) -> None:
        """Return when all ranks have called it."""

    def shutdown(self) -> None:
        """Shut Horovod down before exit, so that MPI jobs end cleanly."""

    def step(self, name: str, shape: tuple[int, ...], layout: str, dtype: str) -> Step:
        """Return one forward and backward of a contestant's layer on random values; `shape` is (N, C, ...) in both layouts."""

    def chain(self, name: str, shape: tuple[int, ...]) -> Step:
        """Return the same for `depth` layers, one after the other."""

    def allreduce(self, words: int, engine: str = "horovod") -> Step:
        """Return an allreduce of int64 words without a layer, once for each direction, by one of `engines`."""

    def set_allreduce(self, words: int) -> Step:
        """Return the same in one of four process sets, if the job has them."""

    def network(self, name: str, images: int, size: int) -> Step:
        """Return forward and backward of a ResNet-50 with a contestant's batch norm layers."""

    def normalize(
        self, name: str, x: NDArray[np.float32], gamma: NDArray[np.float32], beta: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return the output in training of a new layer with these parameters, channels first."""


class FrameworkThatTrains(Framework, Protocol):
    """Methods that are needed only for PyTorch."""

    def training(self, name: str, images: int, size: int) -> Step:
        """Return `network` plus an optimizer step that averages all gradients over the ranks."""

    def ddp(self, name: str, images: int, size: int) -> Step:
        """Return `network` in DistributedDataParallel, which averages the gradients; all over torch.distributed's Gloo."""

    def saved(self, name: str, shape: tuple[int, ...], relu: bool) -> dict[str, int]:
        """Return the bytes that a layer's forward (and a relu) keeps for its backward, by kind."""


WHOLE_BATCH = ("ours alone", "local")  # contestants that process the whole batch in one process


LABELS = {
    "torch": {"local": "F.batch_norm", "horovod": "hvd.SyncBatchNorm"},
    "tensorflow": {"local": "Keras BatchNormalization", "horovod": "hvd.SyncBatchNormalization (tf_keras)"},
}


def label(framework: str, name: str) -> str:
    """Return the name of a contestant for tables."""
    other = {
        "synchronized": "Keras synchronized=True",
        "allreduce": "bare allreduce",
        "allreduce, torch.distributed": "bare allreduce of torch.distributed",
    }
    return LABELS[framework].get(name) or other.get(name, name)


def sizes(shape: Sequence[int]) -> str:
    """Return a shape as text."""
    return "x".join(map(str, shape))


class Spread(NamedTuple):
    """A median with its quartiles."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.middle)} ({number(self.low)}-{number(self.high)})"


def spread(values: list[float]) -> Spread:
    """Return the quartiles of one or more values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, middle, high)


SETS = [[0, 1], [2, 3], [0, 2], [1, 3]]  # the process sets of four ranks


def number(value: float) -> str:
    """Return a number with three digits."""
    if value == 0 or not np.isfinite(value):
        return str(value)
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - int(np.floor(np.log10(abs(value)))))}f}"


def one_line(error: BaseException) -> str:
    """Return an error as one line."""
    text = re.sub(r"\{\{.*?\}\} ?", "", str(error)).strip()  # TensorFlow's numbered nodes
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"[:300]


def timed(function: Callable[[], object]) -> Step:
    """Return a step that times a function."""

    def step() -> tuple[float]:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start,)

    return step


def attempt(make: Mapping[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, str]]:
    """Create every contestant and call it twice (for tracing and caches); return the steps and the errors."""
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
    """Call every step once per round, so that changes of the machine's speed affect all; add failures to `errors`."""
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
    """Return the times of the slowest rank in each round, which are those of the job."""
    return {
        name: [
            [max(parts) for parts in zip(*together, strict=True)] for together in zip(*(t[name] for t in ranks), strict=True)
        ]
        for name in ranks[0]
        if all(name in times for times in ranks)
    }


def total(times: Times, name: str) -> list[float]:
    """Return the seconds of a contestant's calls, over all parts."""
    return [sum(parts) for parts in times[name]]


def ratios(numerator: list[float], denominator: list[float]) -> Spread:
    """Return the quartiles of the ratios within rounds, because a slow round affects both."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])
