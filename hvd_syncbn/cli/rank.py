"""One rank of a job of ``job.py``: ``python -m hvd_syncbn.cli.rank TASK FRAMEWORK SECONDS LAUNCHER RANKS``.

Rank 0 prints the reports. Tasks take ``horovod.<framework>``, or another engine of ``engines.py``.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from hvd_syncbn import __version__, native, vectors
from hvd_syncbn.cli import engines
from hvd_syncbn.cli.job import MARK
from hvd_syncbn.cli.packets import DISTRIBUTED, STAGES
from hvd_syncbn.cli.stacks import LAYOUTS, Stack, gpu, tensorflow_stack, tensorflow_step, torch_stack

PACKET_CHANNELS = (64, 2048, 16384)
"""Channels of a narrow layer, of the widest layer of a ResNet-50, and 8 times as many."""

_WARM_UP = 5
_ROUNDS = (7, 200)  # minimum, maximum
_ROUNDS_OF_STAGES = (20, 1000)
_SECONDS_PER_PACKET = 1.0


def report(hvd: Any, **values: Any) -> None:
    """Print a report for the process that started the job, on rank 0 only."""
    if hvd.rank() == 0:
        print(f"{MARK}{json.dumps(values)}", flush=True)


def paths(hvd: Any, framework: str) -> None:
    """Report the digest of every instruction-set path and layout, on one rank."""
    stack: Callable[..., Stack] = torch_stack if framework == "torch" else tensorflow_stack
    everything = list(range(vectors.SAMPLES))
    device = gpu(framework, 0)
    report(hvd, configurations=(len(native.isas()) + (device is not None)) * len(LAYOUTS))
    for path in native.isas():
        native.set_isa(path)
        for layout in LAYOUTS:
            configuration = f"{_words(layout)}, {path}"
            report(hvd, configuration=configuration, layout=layout, sha256=vectors.digest(*stack(everything, layout)))
    if device is not None:
        for layout in LAYOUTS:
            sha256 = vectors.digest(*stack(everything, layout, device=device))
            report(hvd, configuration=f"{_words(layout)}, GPU", layout=layout, sha256=sha256)


def _common_gpu(hvd: Any, framework: str) -> str | None:
    """Return this rank's GPU; None if a rank has no GPU, or if ranks share one and Horovod uses NCCL, which rejects that."""
    device = gpu(framework, hvd.local_rank())
    own = (socket.gethostname(), device)
    everyone = hvd.allgather_object(own, name="hvd_syncbn.verify.devices")
    alone = len(set(everyone)) == len(everyone)
    return device if all(name for _, name in everyone) and (alone or not hvd.nccl_built()) else None


def splits(hvd: Any, framework: str) -> None:
    """Report the hosts and versions of all ranks, then the digest of every split of the batch, layout and mode."""
    own = (socket.gethostname(), native.isa(), __version__)
    report(hvd, ranks=hvd.allgather_object(own, name="hvd_syncbn.verify.ranks"))
    modes: dict[str, Callable[..., Stack]] = {"": torch_stack}
    if framework == "tensorflow":
        modes = {", eager": tensorflow_stack, ", graph": partial(tensorflow_stack, graph=True)}
    device = _common_gpu(hvd, framework)
    if device is not None:
        modes |= {f"{mode}, GPU": partial(stack, device=device) for mode, stack in modes.items()}
    report(hvd, configurations=len(vectors.SPLITS) * len(LAYOUTS) * len(modes))
    for kind in vectors.SPLITS:
        mine = vectors.split(hvd.size(), kind)[hvd.rank()]
        for layout in LAYOUTS:
            for mode, stack in modes.items():
                y, dx, running = stack(mine, layout)
                everyone = hvd.allgather_object((mine, y, dx, running), name="hvd_syncbn.verify.parts")
                order = np.argsort([sample for samples, *_ in everyone for sample in samples])
                whole = [np.concatenate([part[i] for part in everyone])[order] for i in (1, 2)]
                # Each rank has its own running statistics, which must be equal.
                digests = {vectors.digest(whole[0], whole[1], part[3]) for part in everyone}
                configuration = f"{kind}, {_words(layout)}{mode}"
                sha256 = digests.pop() if len(digests) == 1 else "ranks differ"
                report(hvd, configuration=configuration, split=kind, layout=layout, sha256=sha256)


def replicas(hvd: Any, framework: str) -> None:
    """As ``splits``, between the replicas of a tf.distribute strategy, which may be threads of one process."""
    import tensorflow as tf

    own = (socket.gethostname(), native.isa(), __version__)
    report(hvd, ranks=[own] * hvd.size())
    report(hvd, configurations=2 * len(vectors.SPLITS) * len(LAYOUTS))
    for kind in vectors.SPLITS:
        for layout in LAYOUTS:
            for mode in ("eager", "graph"):
                run = partial(_run_replicas, hvd.strategy, vectors.split(hvd.size(), kind), layout)
                y, dx, running = (tf.function(run, autograph=False) if mode == "graph" else run)()
                y, dx, running = (hvd.strategy.experimental_local_results(part)[0] for part in (y, dx, running))
                whole = [part.numpy().astype(np.int32).view(np.float32) for part in (y, dx)]
                if layout == "channels_last":
                    whole = [np.moveaxis(part, -1, 1) for part in whole]
                every = running.numpy().astype(np.int32).view(np.float32).reshape(hvd.size(), vectors.LAYERS, 2, -1)
                digests = {vectors.digest(whole[0], whole[1], [(mean, var) for mean, var in of_one]) for of_one in every}
                sha256 = digests.pop() if len(digests) == 1 else "ranks differ"
                report(hvd, configuration=f"{kind}, {_words(layout)}, {mode}", split=kind, layout=layout, sha256=sha256)


def _run_replicas(strategy: Any, shares: list[list[int]], layout: str) -> Any:
    """Return the bits of y and dx of the global batch, and of the running statistics of every replica, as int64."""
    import tensorflow as tf

    x, dy = (np.moveaxis(values, 1, -1) if layout == "channels_last" else values for values in vectors.inputs())

    def share(context: Any) -> Any:
        number = context.replica_id_in_sync_group
        samples = shares[number]
        return tf.constant(number), tf.constant(samples, tf.int32), tf.constant(x[samples]), tf.constant(dy[samples])

    def run(number: Any, samples: Any, x: Any, dy: Any) -> Any:
        y, dx, running = tensorflow_step(x, dy, layout)
        parts = [(samples, y, vectors.SAMPLES), (samples, dx, vectors.SAMPLES)]
        parts.append((number[None], tf.stack(tf.nest.flatten(running))[None], len(shares)))
        # Every place of the sum has one value and zeros: integers keep all bits.
        placed = [
            tf.scatter_nd(where[:, None], tf.cast(tf.bitcast(part, tf.int32), tf.int64), [length, *part.shape[1:]])
            for where, part, length in parts
        ]
        return tuple(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, placed))

    return strategy.run(run, strategy.experimental_distribute_values_from_function(share))


def _words(layout: str) -> str:
    return layout.replace("_", " ")


def _allreduce(hvd: Any, framework: str, words: int, ranks: Any) -> Callable[[], Any]:
    """Return a function that runs one allreduce of a packet, as a layer does."""
    name = f"hvd_syncbn.doctor.{words}"
    if framework == "torch":
        import torch

        import hvd_syncbn.torch  # noqa: F401, loads the operators
        from hvd_syncbn.torch_impl import ranks as groups

        packet, group = torch.zeros(words, dtype=torch.int64), groups.find(ranks)
        return lambda: group.sum(packet, name)
    import tensorflow as tf

    zeros = tf.zeros(words, tf.int64)
    # In a graph, because TensorFlow passes names to Horovod only there.
    return tf.function(lambda: hvd.allreduce(zeros, op=hvd.Sum, name=name, process_set=ranks), autograph=False)


def _seconds(hvd: Any, framework: str, words: int, ranks: Any) -> float:
    """Return the median seconds of a packet's allreduce on the slowest rank; all process sets are measured at once."""
    allreduce = _allreduce(hvd, framework, words, ranks)

    def once(_: int = 0) -> float:
        start = time.perf_counter()
        allreduce()
        return time.perf_counter() - start

    rounds = _rounds(hvd, once, _ROUNDS)
    return max(hvd.allgather_object(statistics.median(map(once, range(rounds))), name="hvd_syncbn.doctor.seconds"))


def _rounds(hvd: Any, once: Callable[[], float], limits: tuple[int, int]) -> int:
    """Return how often to measure a call that takes `once()` seconds, the same number on every rank."""
    fastest = min(once() for _ in range(_WARM_UP))
    slow = max(hvd.allgather_object(fastest, name="hvd_syncbn.doctor.rounds"))
    least, most = limits
    return min(most, max(least, int(_SECONDS_PER_PACKET / slow)))


def _stages(hvd: Any, framework: str, words: int) -> None:
    """Report the stages of a packet among all ranks, if the installed Horovod records them (patch 0042)."""
    if isinstance(hvd, engines.Distributed):
        return
    library = hvd.mpi_ops._basics.MPI_LIB_CTYPES
    if not hasattr(library, "horovod_record_stages"):
        return
    allreduce = _allreduce(hvd, framework, words, hvd.global_process_set)
    moments = (ctypes.c_int64 * (len(STAGES) - 1))()
    found: list[list[float]] = []
    by_caller: list[int] = []

    def once() -> float:
        start = time.monotonic_ns()
        allreduce()
        end = time.monotonic_ns()
        ran_by_caller = library.horovod_last_stages(moments)
        if ran_by_caller >= 0:  # -1: asynchronous completion, whose end Horovod does not see
            # A cycle may have begun before the packet was enqueued.
            in_order = itertools.accumulate([start, *moments, end], max)
            found.append([1e-9 * (b - a) for a, b in itertools.pairwise(in_order)])
            by_caller.append(ran_by_caller)
        return 1e-9 * (end - start)

    library.horovod_record_stages(True)
    rounds = _rounds(hvd, once, _ROUNDS_OF_STAGES)
    found.clear()
    by_caller.clear()
    for _ in range(rounds):
        once()
    library.horovod_record_stages(False)
    everyone = hvd.allgather_object((found, by_caller), name="hvd_syncbn.doctor.stages")
    rows = np.array([row for stages, _ in everyone for row in stages])
    if len(rows) == 0:
        return
    stages = {name: np.quantile(rows[:, i], [0.5, 0.99]).tolist() for i, name in enumerate(STAGES)}
    report(hvd, bytes=8 * words, stages=stages, ran_by_caller=float(np.mean([x for _, own in everyone for x in own])))


def packets(hvd: Any, framework: str) -> None:
    """Report the cost of packets among all ranks."""
    hosts = hvd.allgather_object(socket.gethostname(), name="hvd_syncbn.doctor.hosts")
    if isinstance(hvd, engines.Distributed):
        controller = DISTRIBUTED
    else:
        controller = "MPI" if hvd.mpi_built() and hvd.mpi_enabled() else "Gloo"
    report(hvd, hosts=hosts, controller=controller)
    _measure(hvd, framework, [list(range(hvd.size()))], hosts, hvd.global_process_set)
    for channels in PACKET_CHANNELS[:2]:
        _stages(hvd, framework, native.packet_size(channels))


def grouped_packets(hvd: Any, framework: str) -> None:
    """Report the cost of packets in smaller groups, all groups of a size at once, and among the first ranks of the hosts."""
    hosts = hvd.allgather_object(socket.gethostname(), name="hvd_syncbn.doctor.hosts")
    for groups in layouts(hosts):
        sets = [hvd.add_process_set(group) for group in groups]
        mine = next((s for s, group in zip(sets, groups, strict=True) if hvd.rank() in group), None)
        _measure(hvd, framework, groups, hosts, mine)
        for process_set in sets:
            hvd.remove_process_set(process_set)
    hvd.allgather_object(None, name="hvd_syncbn.doctor.end")  # the first rank that leaves ends Horovod for all


def layouts(hosts: list[str]) -> list[list[list[int]]]:
    """Return the groups to measure for each size, then one group with a rank of every host.

    Sizes are the powers of two and, if all hosts have equally many ranks, the ranks of a host. Groups are of consecutive
    ranks. ``hosts`` has the host of every rank.
    """
    ranks = len(hosts)
    names = list(dict.fromkeys(hosts))
    per_host = {hosts.count(name) for name in names}
    sizes = {2**i for i in range(1, ranks.bit_length())} | (per_host if len(per_host) == 1 else set())
    found = [
        [list(range(first, first + size)) for first in range(0, ranks - size + 1, size)]
        for size in sorted(sizes)
        if 1 < size < ranks
    ]
    first_ranks = [hosts.index(name) for name in names]
    if 1 < len(names) < ranks and all([first_ranks] != groups for groups in found):
        found.append([first_ranks])
    return found


def _measure(hvd: Any, framework: str, groups: list[list[int]], hosts: list[str], mine: Any) -> None:
    """Report every packet of one layout of groups; ranks outside all groups only take part in the agreements."""
    spans = max(len({hosts[rank] for rank in group}) for group in groups)
    for channels in PACKET_CHANNELS:
        words = native.packet_size(channels)
        if mine is None:
            hvd.allgather_object(0.0, name="hvd_syncbn.doctor.rounds")
            hvd.allgather_object(0.0, name="hvd_syncbn.doctor.seconds")
        else:
            seconds = _seconds(hvd, framework, words, mine)
            # The first rank of the job is in every layout's first group.
            size = len(groups[0])
            neighbours = groups[0] == list(range(size))
            report(hvd, size=size, groups=len(groups), neighbours=neighbours, spans=spans, bytes=8 * words, seconds=seconds)


TASKS = {"paths": paths, "splits": splits, "replicas": replicas, "packets": packets, "grouped packets": grouped_packets}


def main() -> None:
    """Run the task within its time limit."""
    task, framework, seconds, launcher, ranks = sys.argv[1:]
    hvd = engines.find(framework, launcher, int(ranks))
    # If the launcher is killed, no other process ends this rank on another host.
    signal.alarm(int(seconds))
    if framework == "torch":
        import torch

        torch.set_num_threads(1)
    hvd.init()
    TASKS[task](hvd, framework)
    report(hvd, done=True)
    hvd.shutdown()
    sys.stdout.flush()
    os._exit(0)  # skips the frameworks' slow exit handlers


if __name__ == "__main__":
    main()
