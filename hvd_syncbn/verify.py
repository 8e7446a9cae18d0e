"""``hvd-syncbn verify``: does this machine give the same bits in every framework, layout and instruction-set path?

Each framework runs in a process of its own (Horovod serves one framework per process) the stack of ``vectors.py``, on the
whole global batch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hvd_syncbn import native, vectors
from hvd_syncbn.horovod import FRAMEWORKS

LAYOUTS = ("channels_first", "channels_last")
TIME_LIMIT = 300

Stack = tuple[NDArray[np.float32], NDArray[np.float32], list[tuple[NDArray[np.float32], NDArray[np.float32]]]]


def torch_stack(samples: list[int], layout: str) -> Stack:
    """``(y, dx, running statistics)`` of the stack on this rank's samples, in PyTorch; y and dx with channels first."""
    import torch

    from hvd_syncbn.torch import SyncBatchNorm

    layers = []
    for i in range(vectors.LAYERS):
        layer = SyncBatchNorm(vectors.CHANNELS, vectors.EPS, vectors.MOMENTUM, activation="relu" if vectors.RELU[i] else None)
        layer.collective_name = f"stack.{i}"  # the same every time, as in training
        with torch.no_grad():
            for parameter, values in zip((layer.weight, layer.bias), vectors.parameters(i), strict=True):
                parameter.copy_(torch.from_numpy(values))
        layers.append(layer)
    x, dy = (torch.from_numpy(values[samples]) for values in vectors.inputs())
    if layout == "channels_last":
        x, dy = (t.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1) for t in (x, dy))
    x.requires_grad_()
    outputs: list[torch.Tensor] = []
    for layer, source in zip(layers, vectors.RESIDUAL_OF, strict=True):
        outputs.append(layer(outputs[-1] if outputs else x, None if source is None else outputs[source]))
    outputs[-1].backward(dy)
    assert x.grad is not None
    running = [(layer.running_mean.numpy(), layer.running_var.numpy()) for layer in layers]
    return outputs[-1].detach().numpy(), x.grad.numpy(), running


def tensorflow_stack(samples: list[int], layout: str, graph: bool = False) -> Stack:
    """The same in TensorFlow, eagerly or as a ``tf.function``."""
    import tensorflow as tf

    from hvd_syncbn.tensorflow import sync_batch_norm

    last = layout == "channels_last"

    def run(x: Any, dy: Any) -> Any:
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
                    axis=-1 if last else 1,
                    residual=None if source is None else outputs[source],
                    activation="relu" if vectors.RELU[i] else None,
                    unbiased_variance=True,
                    name=f"stack.{i}",
                )
                outputs.append(y)
                running.append(tuple(statistics))
        return outputs[-1], tape.gradient(outputs[-1], x, output_gradients=dy), running

    x, dy = (np.moveaxis(v[samples], 1, -1) if last else v[samples] for v in vectors.inputs())
    function = tf.function(run, autograph=False) if graph else run
    y, dx, running = function(tf.constant(x), tf.constant(dy))
    y, dx = (np.moveaxis(t.numpy(), -1, 1) if last else t.numpy() for t in (y, dx))
    return y, dx, [(mean.numpy(), variance.numpy()) for mean, variance in running]


def _digests(framework: str) -> dict[str, str]:
    """``"layout, path"`` -> sha256, in this process."""
    from hvd_syncbn import horovod

    horovod.load(framework).init()
    stack = torch_stack if framework == "torch" else tensorflow_stack
    everything = list(range(vectors.SAMPLES))
    digests = {}
    for path in native.isas():
        native.set_isa(path)
        for layout in LAYOUTS:
            digests[f"{layout}, {path}"] = vectors.digest(*stack(everything, layout))
    return digests


def verify() -> int:
    """Prints the sha256 of every framework, layout and path, and whether they are one. The exit status: 0 if so."""
    console = Console()
    table = Table(
        title="One training step of a 5-layer stack: sha256 of outputs, input gradients, running statistics",
        title_justify="left",
    )
    for column in ("framework", "layout, instructions", "sha256"):
        table.add_column(column, no_wrap=True)
    found: set[str] = set()
    missing = []
    for framework, label in FRAMEWORKS.items():
        if importlib.util.find_spec(framework) is None:
            console.print(f"{label} is not installed: left out")
            continue
        result = subprocess.run(
            [sys.executable, "-m", "hvd_syncbn.verify", framework],
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=False,
        )
        if result.returncode != 0:
            console.print(f"{label}: {result.stderr.strip().splitlines()[-1]}", markup=False)
            missing.append(label)
            continue
        for variant, digest in json.loads(result.stdout.splitlines()[-1]).items():
            table.add_row(label, variant, digest[:32] + "...")
            found.add(digest)
    console.print(table)
    if missing:
        console.print(f"[red]Could not run: {', '.join(missing)}[/red]")
        return 1
    if len(found) != 1:
        console.print(f"[red]NOT EQUAL: {len(found)} different results[/red]")
        return 1
    console.print("[green]EQUAL: one sha256 across frameworks, layouts and instruction-set paths[/green]")
    return 0


if __name__ == "__main__":
    print(json.dumps(_digests(sys.argv[1])))
