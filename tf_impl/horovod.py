"""Horovod as the engine that sums packets, for TensorFlow."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import function_pb2
from tensorflow.python.eager import context, execute

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
        # An elastic job may grow while a graph traced for one rank is in use.
        if self.current_size() == 1 and not int(os.environ.get("HOROVOD_ELASTIC", "0")):
            return packet
        horovod.check_not_forked(self.hvd)
        layer = name.rpartition(".")[0]
        name = re.sub(r"[^\w.-]", "_", f"hvd_syncbn.{name}", flags=re.ASCII)
        if not tf.executing_eagerly():
            return self._sum_in_graph(packet, name)
        horovod.warn_if_sizes_differ(name, self.number, packet.shape[0])
        try:
            return _eager_allreduce(name, self.number, packet.dtype)(packet)
        except tf.errors.FailedPreconditionError as error:
            detail = horovod.mismatch(error)
            if detail is None:
                raise
            raise ValueError(horovod.disagreement(layer, detail)) from error
        except tf.errors.UnknownError as error:
            from horovod.common.exceptions import HorovodInternalError

            raise HorovodInternalError(error) from error

    def _sum_in_graph(self, packet: Any, name: str) -> Any:
        # From the root scope, so that no scope gets into the name that one rank alone may have counted up; TensorFlow numbers
        # the uses within a graph.
        with tf.name_scope(_SCOPE):
            packet = self.hvd.allreduce(packet, op=self.hvd.Sum, name=name, process_set=self.process_set)
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


class _EagerAllreduce:
    """An allreduce for eager code, as a function of TensorFlow that holds Horovod's op under its name.

    Horovod takes an op's name, which an op has only inside of a function: alone, all layers' would have the same. A
    `tf.function` for each name would be slower, larger, and warn of retracing.
    """

    def __init__(self, name: str, number: int, dtype: Any) -> None:
        self.name = f"hvd_syncbn_{number}.{name}.{dtype.name}"
        node = f"{_SCOPE}{name}"
        function = function_pb2.FunctionDef()
        function.signature.name = self.name
        function.signature.input_arg.add(name="packet", type=dtype.as_datatype_enum)
        function.signature.output_arg.add(name="sum", type=dtype.as_datatype_enum)
        function.node_def.add(name=node, op="HorovodAllreduce", input=["packet"])
        attributes = function.node_def[0].attr
        attributes["T"].type = dtype.as_datatype_enum
        attributes["reduce_op"].i = horovod.require("tensorflow").Sum
        attributes["prescale_factor"].f = attributes["postscale_factor"].f = 1.0
        attributes["ignore_name_scope"].b = False
        attributes["process_set_id"].i = number
        function.ret["sum"] = f"{node}:sum:0"
        context.ensure_initialized()
        context.context().add_function_def(function)

    def __call__(self, packet: Any) -> Any:
        return execute.execute(self.name, 1, [packet], None, context.context())[0]

    def __del__(self) -> None:
        context.context().remove_function(self.name)


# More than the layers of a network; models that are made in a loop do not fill the memory.
_eager_allreduce = lru_cache(maxsize=1024)(_EagerAllreduce)
