"""Runs the stack of ``vectors.py`` in the reference, in PyTorch and in TensorFlow; all must give the same sha256."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_syncbn import native, protocol, vectors

LAYOUTS = ("channels_first", "channels_last")

Stack = tuple[NDArray[np.float32], NDArray[np.float32], list[tuple[NDArray[np.float32], NDArray[np.float32]]]]


def reference_stack() -> Stack:
    """Return ``(y, dx, running statistics)`` of the stack on the global batch, by ``protocol.py`` without native code.

    Takes about 2 seconds.
    """

    def flat(values: NDArray[Any]) -> NDArray[np.float64]:
        return values.reshape(*values.shape[:2], -1).astype(np.float64)

    x, dy = map(flat, vectors.inputs())
    inputs, outputs = [x], list[NDArray[np.float64]]()
    statistics, running = [], []
    for i in range(vectors.LAYERS):
        gamma, beta = (values.astype(np.float64) for values in vectors.parameters(i))
        packet = protocol.forward_packet(inputs[i], vectors.EPS, "float32")
        found = protocol.finish_forward(packet, vectors.EPS)
        source = vectors.RESIDUAL_OF[i]
        residual = None if source is None else outputs[source]
        y = protocol.apply_forward(inputs[i], found, "float32", gamma.tolist(), beta.tolist(), residual, vectors.RELU[i])
        inputs.append(y)
        outputs.append(y)
        statistics.append(found)
        weights = 1 - vectors.MOMENTUM, vectors.MOMENTUM
        means = [protocol.running(0.0, s.mean, *weights) for s in found]
        variances = [protocol.running(1.0, protocol.unbiased(s.var, packet.count), *weights) for s in found]
        running.append((np.array(means, np.float32), np.array(variances, np.float32)))
    gradients: list[Any] = [None] * (vectors.LAYERS - 1) + [dy]  # of every layer's output
    for i in reversed(range(vectors.LAYERS)):
        mask = outputs[i] if vectors.RELU[i] else None
        packet = protocol.backward_packet(inputs[i], gradients[i], statistics[i], mask)
        gamma = vectors.parameters(i)[0].astype(np.float64)
        dx, dresidual = protocol.apply_backward(inputs[i], gradients[i], packet, statistics[i], "float32", gamma.tolist(), mask)
        for source, gradient in ((i - 1, dx), (vectors.RESIDUAL_OF[i], dresidual)):
            if source is not None and source >= 0:
                before = gradients[source]
                # The frameworks add gradients in float32; rounding the float64 sum of two gives the same value.
                total = gradient if before is None else (before + gradient).astype(np.float32).astype(np.float64)
                gradients[source] = total
    shape = vectors.inputs()[0].shape
    return outputs[-1].reshape(shape).astype(np.float32), dx.reshape(shape).astype(np.float32), running


def gpu(framework: str, number: int) -> str | None:
    """Return the framework's name of GPU ``number`` (modulo the GPUs it sees); None without CUDA kernels or GPUs."""
    if not native.has_cuda():
        return None
    if framework == "torch":
        import torch

        return f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.is_available() else None
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    return f"/GPU:{number % len(gpus)}" if gpus else None


def torch_stack(samples: list[int], layout: str, device: str = "cpu", process_set: Any = None) -> Stack:
    """Return ``(y, dx, running statistics)`` of the stack on this rank's samples, in PyTorch; y and dx are channels first."""
    import torch

    from hvd_syncbn.torch import SyncBatchNorm

    layers = []
    for i in range(vectors.LAYERS):
        options = {"process_set": process_set, "activation": "relu" if vectors.RELU[i] else None}
        layer = SyncBatchNorm(vectors.CHANNELS, vectors.EPS, vectors.MOMENTUM, **options)
        layer.collective_name = f"stack.{i}"  # the same every time, as in training
        with torch.no_grad():
            for parameter, values in zip((layer.weight, layer.bias), vectors.parameters(i), strict=True):
                parameter.copy_(torch.from_numpy(values))
        layers.append(layer.to(device))
    x, dy = (torch.from_numpy(values[samples]).to(device) for values in vectors.inputs())
    if layout == "channels_last":
        x, dy = (t.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1) for t in (x, dy))
    x.requires_grad_()
    outputs: list[torch.Tensor] = []
    for layer, source in zip(layers, vectors.RESIDUAL_OF, strict=True):
        outputs.append(layer(outputs[-1] if outputs else x, None if source is None else outputs[source]))
    outputs[-1].backward(dy)
    assert x.grad is not None
    running = [
        (layer.get_buffer("running_mean").cpu().numpy(), layer.get_buffer("running_var").cpu().numpy()) for layer in layers
    ]
    return outputs[-1].detach().cpu().numpy(), x.grad.cpu().numpy(), running


def tensorflow_step(x: Any, dy: Any, layout: str) -> Any:
    """Return ``(y, dx, running statistics)`` of the stack as tensors, for tensors in a layout."""
    import tensorflow as tf

    from hvd_syncbn.tensorflow import sync_batch_norm

    running: list[Any] = []
    outputs: list[Any] = []
    with tf.GradientTape() as tape:
        tape.watch(x)
        for i in range(vectors.LAYERS):
            source = vectors.RESIDUAL_OF[i]
            y, *statistics = sync_batch_norm(
                outputs[-1] if outputs else x,
                *vectors.parameters(i),
                np.zeros(vectors.CHANNELS, np.float32),
                np.ones(vectors.CHANNELS, np.float32),
                training=True,
                momentum=1 - vectors.MOMENTUM,
                epsilon=vectors.EPS,
                axis=-1 if layout == "channels_last" else 1,
                residual=None if source is None else outputs[source],
                activation="relu" if vectors.RELU[i] else None,
                unbiased_variance=True,
                name=f"stack.{i}",
            )
            outputs.append(y)
            running.append(tuple(statistics))
    return outputs[-1], tape.gradient(outputs[-1], x, output_gradients=dy), running


def tensorflow_stack(samples: list[int], layout: str, graph: bool = False, device: str = "/CPU:0") -> Stack:
    """The same in TensorFlow, eagerly or as a ``tf.function``."""
    import tensorflow as tf

    last = layout == "channels_last"
    x, dy = (np.moveaxis(v[samples], 1, -1) if last else v[samples] for v in vectors.inputs())
    function = tf.function(tensorflow_step, autograph=False) if graph else tensorflow_step
    with tf.device(device):
        y, dx, running = function(tf.constant(x), tf.constant(dy), layout)
    y, dx = (np.moveaxis(t.numpy(), -1, 1) if last else t.numpy() for t in (y, dx))
    return y, dx, [(mean.numpy(), variance.numpy()) for mean, variance in running]
