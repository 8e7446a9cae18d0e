"""What both adapters ask of Horovod. Nothing here is imported until a layer trains on several ranks' behalf."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

from hvd_syncbn.groups import Groups, deal

# By the name of the Horovod module, what people call the framework.
FRAMEWORKS = {"torch": "PyTorch", "tensorflow": "TensorFlow"}

# What else a job can use, by the name of the framework.
_OTHER_ENGINES = {
    "torch": " Or use torchrun, and call `torch.distributed.init_process_group()`.",
    "tensorflow": " Or train under a tf.distribute strategy.",
}


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
            + _OTHER_ENGINES.get(framework, "")
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
        raise _not_initialized(hvd)
    return hvd


def _not_initialized(hvd: Any) -> RuntimeError:
    return RuntimeError(
        f"Horovod is not initialised: call `{hvd.__name__}.init()` before training "
        "(evaluation works without). One process without horovodrun is fine, too."
        + _OTHER_ENGINES.get(hvd.__name__.rpartition(".")[2], "")
    )


# The Horovod modules that were initialised when this process was forked. Their threads are not in this process.
_forked: set[str] = set()


def _after_fork_in_child() -> None:
    for framework in FRAMEWORKS:
        hvd: Any = sys.modules.get(f"horovod.{framework}")
        if hasattr(hvd, "is_initialized") and hvd.is_initialized():  # it may be half imported
            _forked.add(hvd.__name__)


os.register_at_fork(after_in_child=_after_fork_in_child)


def check_not_forked(hvd: Any) -> None:
    """Check that collectives can run in this process.

    Raises:
        RuntimeError: the process was forked after Horovod was initialised: a collective would never end.
    """
    if _forked and hvd.__name__ in _forked:
        raise RuntimeError(
            "Horovod does not run in a process that was forked after `hvd.init()`: a collective would wait forever. Call "
            "`.eval()` on a model that a dataset's transform uses (in Keras `training=False`), or `revert_sync_batchnorm` on a "
            "copy that trains here alone. A process that is to be a rank has to be forked before `hvd.init()`, or spawned. "
            f"Received: process {os.getpid()}, forked by process {os.getppid()}"
        )


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
        ValueError: the process set is not registered with Horovod, or no more, or this rank is not in it.
        RuntimeError: Horovod is not initialised; there are several ranks, and this process was forked after it was.
    """
    # The global set's own methods speak for whichever framework's Horovod was imported last.
    number = process_set_id(process_set)
    if number == 0:
        try:
            ranks = int(hvd.size())
        except ValueError as error:
            raise _not_initialized(hvd) from error
        if ranks > 1:
            check_not_forked(hvd)
        return ranks
    if hvd.__name__ in _forked:  # do not ask Horovod: its thread may have held a lock when the process was forked
        if process_set.ranks != [hvd.rank()]:
            check_not_forked(hvd)
        return 1
    if process_set.included() is False:
        raise ValueError(f"rank {hvd.rank()} is not in the process set that it should share with. Received: {process_set}")
    # An elastic job that was reset has given up its sets, and may have given the number to another one since.
    try:
        ranks, own = int(process_set.size()), int(process_set.rank())
    except ValueError as error:
        raise ValueError(_gone(process_set, str(error))) from error
    if process_set.ranks is not None and (ranks != len(process_set.ranks) or process_set.ranks[own] != hvd.rank()):
        raise ValueError(_gone(process_set, f"process set {number} has {ranks} ranks"))
    return ranks


def _gone(process_set: Any, detail: str) -> str:
    return (
        "the process set is not Horovod's any more: it was removed, or the elastic job was reset. Make it again, with groups() "
        "or hvd.add_process_set(), and convert the model with it, at the start of the function that hvd.elastic.run decorates. "
        f"Received: {process_set} ({detail})"
    )


class Group:
    """Ranks that share a batch: a process set of Horovod, as one framework uses it.

    Each adapter derives its own from it, with two methods for which the frameworks differ: ``sum(packet, name)`` and
    ``gather(value, name)``.
    """

    def __init__(self, framework: str, process_set: Any) -> None:
        """Find a process set (None is that of all ranks).

        Raises:
            RuntimeError: Horovod is missing or not initialised, or this process was forked after it was.
            ValueError: the process set is not registered with Horovod, or no more, or this rank is not in it.
        """
        self.hvd = load(framework)
        self.size = size(self.hvd, process_set)
        self.number = process_set_id(process_set)
        self.process_set = process_set if self.number else self.hvd.global_process_set

    @property
    def key(self) -> str:
        """The name by which operators know the group."""
        return key(self.number)

    @property
    def rank(self) -> int:
        """This rank's number in the job."""
        return int(self.hvd.rank())

    @property
    def ranks(self) -> list[int]:
        """The numbers of the group's ranks in the job."""
        return ranks_of(self.process_set) or list(range(self.size))

    def current_size(self) -> int:
        """The number of ranks, which a reset of an elastic job changes; raises the same errors as ``Group``."""
        return size(self.hvd, self.process_set)


def key(number: int) -> str:
    """The name by which operators know the process set of a number."""
    return f"horovod:{number}"


def process_set_of(framework: str, key: str) -> Any:
    """The process set that a key names, for operators in a program that another process has compiled or saved."""
    number = int(key.partition(":")[2])
    hvd = require(framework)
    process_set = hvd.ProcessSet(hvd.mpi_ops._basics._get_process_set_ids_and_ranks().get(number, []))
    process_set.process_set_id = number
    return process_set


def groups(hvd: Any, size: int | None) -> Groups:
    """The process sets behind the frameworks' ``groups``, which say what it does."""
    check_not_forked(hvd)
    wanted = deal(size, lambda value: hvd.allgather_object(value, name="hvd_syncbn.groups"))
    there = {tuple(known): number for number, known in hvd.mpi_ops._basics._get_process_set_ids_and_ranks().items()}
    found = [_process_set(hvd, group, there.get(tuple(group))) for group in wanted]
    return Groups(next(s for s, group in zip(found, wanted, strict=True) if hvd.rank() in group), found)


def _process_set(hvd: Any, ranks: list[int], number: int | None) -> Any:
    """A set that Horovod has under this number, or a new one."""
    if len(ranks) == hvd.size():
        return hvd.global_process_set
    process_set = hvd.ProcessSet(ranks)
    if number is not None:
        process_set.process_set_id = number
        return process_set
    try:
        return hvd.add_process_set(process_set)
    except ValueError as error:
        if "shutting down" in str(error):  # another rank died meanwhile; in this form hvd.elastic.run goes on after it
            from horovod.common.exceptions import HorovodInternalError

            raise HorovodInternalError(str(error)) from error
        raise ValueError(
            "Horovod lets process sets come while a job runs if it was told so: call `hvd.init(process_sets='dynamic')`, or "
            f"set HOROVOD_DYNAMIC_PROCESS_SETS=1 for all ranks. Received: {process_set} ({error})"
        ) from error


# The size of the packets of a collective, by its name and process set; None once it was warned of.
_packet_sizes: dict[tuple[str, int], int | None] = {}


def warn_if_sizes_differ(name: str, process_set: int, words: int) -> None:
    """Warn, once, of layers with different numbers of channels whose forward collectives have one name.

    Args:
        name: of a collective; backward ones are not looked at.
        process_set: Horovod's number of it.
        words: the size of the packet.
    """
    known = _packet_sizes.setdefault((name, process_set), words)
    if known is None or known == words or not name.rpartition(".")[2].startswith("forward"):
        return
    _packet_sizes[name, process_set] = None
    warnings.warn(
        f"layers with different numbers of channels share the collective name {name!r}. Results are right, but Horovod "
        "negotiates anew at every change of size, and a step can take twice as long. Convert models of one class in one call, "
        "as parts of a module, name Keras models, or set `layer.collective_name` (`name=` of sync_batch_norm). "
        f"Received: packets of {known} and {words} integers",
        stacklevel=2,
    )


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
