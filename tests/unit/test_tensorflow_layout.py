"""What TensorFlow's layout optimizer makes of our operators on a GPU, looked at without one (docs/gpu.md)."""

from __future__ import annotations

from typing import Any

import pytest

tf = pytest.importorskip("tensorflow")
pytest.importorskip("horovod")

import horovod.tensorflow as hvd  # noqa: E402
import keras  # noqa: E402
from tensorflow.core.protobuf import config_pb2, device_properties_pb2, rewriter_config_pb2  # noqa: E402
from tensorflow.python.grappler import cluster, tf_optimizer  # noqa: E402

from hvd_syncbn.keras import SyncBatchNormalization  # noqa: E402

BLOCKS = 3
GPU, CPU = (f"/job:localhost/replica:0/task:0/device:{kind}:0" for kind in ("GPU", "CPU"))


def step(policy: str) -> Any:
    """Forward and backward of convolutions, norms and activations, channels last, as a graph."""
    inputs = x = keras.Input((16, 16, 8), dtype="float32")
    for _ in range(BLOCKS):
        x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False, dtype=policy)(x)
        x = keras.layers.ReLU(dtype=policy)(SyncBatchNormalization(dtype=policy)(x))
    model = keras.Model(inputs, x)

    @tf.function
    def run(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.cast(model(x, training=True), tf.float32) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    return run.get_concrete_function(tf.TensorSpec([32, 16, 16, 8], tf.float32))


def transposes(function: Any, layout_optimizer: bool) -> int:
    """Transpositions in the optimized graph on an H200 that need not exist."""
    graph_def = function.graph.as_graph_def()
    for node in graph_def.node:
        node.device = "" if node.op == "Placeholder" else GPU
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        meta = tf.compat.v1.train.export_meta_graph(graph=graph, graph_def=graph.as_graph_def())
    meta.collection_def["train_op"].node_list.value.extend(tensor.name for tensor in function.outputs)
    devices = [device_properties_pb2.NamedDevice(name=name) for name in (GPU, CPU)]
    devices[0].properties.MergeFrom(
        device_properties_pb2.DeviceProperties(
            type="GPU", environment={"architecture": "9.0"}, num_cores=132, frequency=1700, memory_size=2**34
        )
    )
    devices[1].properties.MergeFrom(device_properties_pb2.DeviceProperties(type="CPU", num_cores=4, frequency=2000))
    config = config_pb2.ConfigProto()
    options = config.graph_options.rewrite_options
    options.min_graph_nodes = -1
    if not layout_optimizer:
        options.layout_optimizer = rewriter_config_pb2.RewriterConfig.OFF
    optimized = tf_optimizer.OptimizeGraph(config, meta, cluster=cluster.Cluster(devices=devices))
    assert sum(node.op == "HvdSyncbnBackwardApply" for node in optimized.node) == BLOCKS
    return sum(node.op == "Transpose" for node in optimized.node)


def test_transpositions_around_the_layer() -> None:
    """float32 has them (the optimizer knows operators by a list of names), unless it is off; 16 bits have none."""
    hvd.init()
    full = step("float32")
    assert transposes(full, layout_optimizer=True) > BLOCKS
    assert transposes(full, layout_optimizer=False) == 0
    for policy in ("mixed_float16", "mixed_bfloat16"):
        assert transposes(step(policy), layout_optimizer=True) == 0
