"""What both adapters ask of Horovod. Nothing here is imported until a layer trains on several ranks' behalf."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

_LABELS = {"torch": "PyTorch", "tensorflow": "TensorFlow"}


@cache
def load(framework: str) -> Any:
    """``horovod.<framework>``, or one ``RuntimeError`` that says what to run."""
    label = _LABELS[framework]
    try:
        return importlib.import_module(f"horovod.{framework}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "horovod":
            raise
        raise RuntimeError(
            f"training with hvd-syncbn needs Horovod for {label}, and it is not installed. Run `hvd-syncbn build-horovod`."
        ) from error
    except Exception as error:  # a library built for another version fails in a framework's own ways
        raise RuntimeError(
            f"Horovod is installed but does not load for {label} (built without it, or for another version). "
            f"Run `hvd-syncbn build-horovod`. Its own words: {str(error).partition(chr(10))[0]}"
        ) from error


def require(framework: str) -> Any:
    """``horovod.torch`` or ``horovod.tensorflow``, loaded and initialised.

    Raises:
        RuntimeError: Horovod is missing, was built without the framework, or ``init()`` was not called; the message holds the
            command that fixes it.
    """
    hvd = load(framework)
    if not hvd.is_initialized():
        raise RuntimeError(
            f"Horovod is not initialised: call `horovod.{framework}.init()` before training "
            "(evaluation works without). One process without horovodrun is fine, too."
        )
    return hvd


def size(hvd: Any, process_set: Any) -> int:
    """Ranks that share a batch: those of ``process_set``, or all where it is None.

    Raises:
        ValueError: the process set is not registered with Horovod, or this rank is not in it.
    """
    # The global set's own methods speak for whichever framework's Horovod was imported last.
    if process_set is None or process_set.process_set_id == 0:
        return int(hvd.size())
    ranks = process_set.size()
    if ranks is None:
        raise ValueError(
            "the process set is not registered: pass it to `hvd.init(process_sets=[...])` or `hvd.add_process_set(...)` "
            f"first. Received: {process_set}"
        )
    if process_set.included() is False:
        raise ValueError(f"rank {hvd.rank()} is not in the process set that it should share with. Received: {process_set}")
    return int(ranks)


def is_mismatch(error: BaseException) -> bool:
    """Whether a Horovod error says that the ranks sent packets of different lengths (their channel counts differ)."""
    return "Mismatched" in str(error)


def disagreement(layer: str, detail: str = "") -> str:
    """The message for ranks that could not share a batch."""
    return (
        f"the ranks disagree about layer {layer!r}: number of channels, eps, dtype and hvd-syncbn version have to be the same "
        f"on every rank.{' ' + detail if detail else ''}"
    )
