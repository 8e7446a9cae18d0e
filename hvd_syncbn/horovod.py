"""What both adapters ask of Horovod. Nothing here is imported until a layer trains on several ranks' behalf."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

# By the name of the Horovod module, what people call the framework.
FRAMEWORKS = {"torch": "PyTorch", "tensorflow": "TensorFlow"}


@cache
def load(framework: str) -> Any:
    """``horovod.<framework>``, or one ``RuntimeError`` that says what to run."""
    label = FRAMEWORKS[framework]
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


def process_set_id(process_set: Any) -> int:
    """Horovod's number of a process set; None is that of all ranks.

    Raises:
        ValueError: the process set is not registered with Horovod.
    """
    number = 0 if process_set is None else process_set.process_set_id
    if number is None:
        raise ValueError(
            "the process set is not registered: pass it to `hvd.init(process_sets=[...])` or `hvd.add_process_set(...)` "
            f"first. Received: {process_set}"
        )
    return int(number)


def ranks_of(process_set: Any) -> list[int] | None:
    """What a file can hold of a process set (or of its ranks): the ranks; None where it is all of them."""
    ranks = getattr(process_set, "ranks", process_set)
    return None if ranks is None or getattr(process_set, "process_set_id", None) == 0 else list(ranks)


def registered_process_set(hvd: Any, ranks: Iterable[int], who: str) -> Any:
    """The registered process set of just these ranks.

    Raises:
        ValueError: there is none; the message says that ``who`` wanted it.
    """
    wanted = list(ranks)
    for number, registered in hvd.mpi_ops._basics._get_process_set_ids_and_ranks().items():
        if list(registered) == wanted:
            process_set = hvd.ProcessSet(wanted)
            process_set.process_set_id = number
            return process_set
    raise ValueError(
        f"{who} is to train on a process set that is not registered: pass `hvd.ProcessSet(ranks)` to "
        "`hvd.init(process_sets=[...])` or `hvd.add_process_set(...)`, or give another `process_set`. "
        f"Received: ranks={wanted}"
    )


def size(hvd: Any, process_set: Any) -> int:
    """Ranks that share a batch: those of ``process_set``, or all where it is None.

    Raises:
        ValueError: the process set is not registered with Horovod, or this rank is not in it.
    """
    # The global set's own methods speak for whichever framework's Horovod was imported last.
    if process_set_id(process_set) == 0:
        return int(hvd.size())
    if process_set.included() is False:
        raise ValueError(f"rank {hvd.rank()} is not in the process set that it should share with. Received: {process_set}")
    return int(process_set.size())


def mismatch(error: BaseException) -> str | None:
    """What Horovod says where the ranks sent packets of different lengths (their channel counts differ); None otherwise."""
    found = re.search("Mismatched.*", str(error))
    return found and found[0]


def disagreement(layer: str, detail: str) -> str:
    """The message for ranks that could not share a batch."""
    return (
        f"the ranks disagree about layer {layer!r}: number of channels, eps, dtype and hvd-syncbn version have to be the same "
        f"on every rank. Received: {detail}"
    )
