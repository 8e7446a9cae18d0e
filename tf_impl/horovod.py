"""Horovod as the engine that sums packets, for TensorFlow."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import function_pb2
from tensorflow.python.eager import context, execute, executor
from tensorflow.python.ops.control_flow_v2_func_graphs import CondBranchFuncGraph

from hvd_syncbn import horovod
from hvd_syncbn.tf_impl import ops

# Horovod's elastic mode recognizes its own errors by "HorovodAllreduce" in their text.
_SCOPE = "HorovodAllreduce/"


class Group(horovod.Group):
    """Ranks that share a batch: a process set of Horovod."""

    def __init__(self, process_set: Any, who: str = "the model") -> None:
        if isinstance(process_set, tuple):  # a layer from a file has only the ranks
            process_set = horovod.registered_process_set(horovod.require("tensorflow"), process_set, who)
        super().__init__("tensorflow", process_set)

    def sum(self, packet: Any, name: str) -> Any:
        """Return the sum of a packet over the ranks."""
        if self._is_alone():
            return packet
        horovod.check_not_forked(self.hvd)
        layer, name = name.rpartition(".")[0], _normalized(name)
        if not tf.executing_eagerly():
            return self._sum_in_graph(packet, name)
        horovod.warn_if_sizes_differ(name, self.number, packet.shape[0])
        with _clear_errors(layer):
            return _eager_allreduces((name, self.number, packet.dtype))(packet)[0]

    def _is_alone(self) -> bool:
        # An elastic job may grow while a graph traced for one rank is in use.
        return self.current_size() == 1 and not int(os.environ.get("HOROVOD_ELASTIC", "0"))

    def _sum_in_graph(self, packet: Any, name: str) -> Any:
        # From the root scope, so that no scope gets into the name that one rank alone may have counted up; TensorFlow numbers
        # the uses within a graph.
        condition = _condition()
        if condition is not None:
            name = f"{condition}.{name}"
        with tf.name_scope(_SCOPE):
            packet = self.hvd.allreduce(
                packet,
                op=self.hvd.Sum,
                name=name,
                process_set=self.process_set,
                ignore_name_scope=condition is not None,
            )
            if packet.shape[0] is not None:
                horovod.warn_if_sizes_differ(packet.op.name.removeprefix(_SCOPE), self.number, packet.shape[0])
            ops.library().hvd_syncbn_keep(packet)
            return packet

    def gather(self, value: object, name: str) -> list[Any]:
        """Return the values of all ranks of the group."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = self.hvd.allgather_object(value, name=f"hvd_syncbn.{name}", process_set=self.process_set)
        return everyone


def sum_together(groups: Sequence[Group], packets: Sequence[Any], names: Sequence[str], waits: bool) -> list[Any]:
    """Return the sums of packets over the ranks, in eager code. All sums start before the first one is awaited.

    Without ``waits``, nothing is awaited: TensorFlow's eager gradients run in no particular order, and other ranks may wait
    for another packet first.
    """
    sums = list(packets)
    shared = [i for i, group in enumerate(groups) if not group._is_alone()]
    if shared:
        horovod.check_not_forked(groups[shared[0]].hvd)
        allreduces = _eager_allreduces(*((_normalized(names[i]), groups[i].number, packets[i].dtype) for i in shared))
        if waits:
            _background().wait()  # for the previous step's
        layers = ", ".join(names[i].rpartition(".")[0] for i in shared)
        with _clear_errors(layers), contextlib.nullcontext() if waits else context.executor_scope(_background()):
            for i, total in zip(shared, allreduces(*(packets[i] for i in shared)), strict=True):
                sums[i] = total
    return sums


@cache
def _background() -> Any:
    """The executor of sums that are not awaited."""
    return executor.new_executor(enable_async=True)


@contextlib.contextmanager
def _clear_errors(layer: str) -> Iterator[None]:
    """Turn what Horovod's eager ops raise into what Python code expects."""
    try:
        yield
    except tf.errors.FailedPreconditionError as error:
        detail = horovod.mismatch(error)
        if detail is None:
            raise
        raise ValueError(horovod.disagreement(layer, detail)) from error
    except tf.errors.UnknownError as error:
        from horovod.common.exceptions import HorovodInternalError

        raise HorovodInternalError(error) from error


def _normalized(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", f"hvd_syncbn.{name}", flags=re.ASCII)


def _condition() -> str | None:
    """Return the name of the outermost `tf.cond` that is being traced, the same in all of its branches; None outside of one.

    A branch's collectives are matched with those of the other branch, which another rank may take: TensorFlow's name of an op
    holds the branch.
    """
    found = None
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        if isinstance(graph, CondBranchFuncGraph):
            found = re.sub(r"_(true|false|branch\d+)_\d+(_grad_\d+)?$", "", graph.name)
        graph = getattr(graph, "outer_graph", None)
    return found


class _EagerAllreduces:
    """Allreduces for eager code that start together, as a function of TensorFlow that holds Horovod's ops under their names.

    Horovod takes an op's name, which an op has only inside of a function: alone, all layers' would have the same. A
    `tf.function` for each name would be slower, larger, and warn of retracing.
    """

    def __init__(self, *calls: tuple[str, int, Any]) -> None:
        function = function_pb2.FunctionDef()
        for i, (name, number, dtype) in enumerate(calls):
            node = function.node_def.add(name=f"{_SCOPE}{name}", op="HorovodAllreduce", input=[f"packet{i}"])
            function.signature.input_arg.add(name=f"packet{i}", type=dtype.as_datatype_enum)
            function.signature.output_arg.add(name=f"sum{i}", type=dtype.as_datatype_enum)
            node.attr["T"].type = dtype.as_datatype_enum
            node.attr["reduce_op"].i = horovod.require("tensorflow").Sum
            node.attr["prescale_factor"].f = node.attr["postscale_factor"].f = 1.0
            node.attr["ignore_name_scope"].b = False
            node.attr["process_set_id"].i = number
            function.ret[f"sum{i}"] = f"{node.name}:sum:0"
        self.name = function.signature.name = ".".join(
            f"hvd_syncbn_{number}.{name}.{dtype.name}" for name, number, dtype in calls
        )
        context.ensure_initialized()
        context.context().add_function_def(function)

    def __call__(self, *packets: Any) -> Any:
        return execute.execute(self.name, len(packets), list(packets), None, context.context())

    def __del__(self) -> None:
        context.context().remove_function(self.name)


# More than the layers of a network; models that are made in a loop do not fill the memory.
_eager_allreduces = lru_cache(maxsize=1024)(_EagerAllreduces)
