"""Runs the Python blocks of README and docs that are for one framework: `python -m tests.unit.blocks torch` (or `keras`).

What a block takes for granted (a model, data, an optimizer) comes from `torch_names` or `keras_names`. Which of them says the
page (`PAGES`) or, invisibly, in the line above the block:

    <!-- block: torch -->                       `torch`, or `keras`, or `keras, raises ValueError`
    <!-- block: not run, because ... -->

A block that imports from hvd_syncbn gets none of its names, and a function `train` that is only defined is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = {
    "cost_model.md": "torch",
    "elastic.md": "torch",
    "exchange.md": "keras",
    "inference.md": "torch",
    "keras.md": "keras",
    "keras_files.md": "keras",
    "pytorch.md": "torch",
    "recalibration.md": "torch",
    "second_derivatives.md": "torch",
}
MARK = re.compile(r"^ *<!-- block: (.*?) -->$")


@dataclass(frozen=True)
class Block:
    """A Python block of a page."""

    page: str
    line: int
    source: str
    framework: str
    """`"torch"` or `"keras"`; empty for one that is not marked on a page without a framework."""
    raises: str | None
    reason: str | None
    """Why it is not run."""

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    """All of them, from README and docs."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        for match in re.finditer(r"^( *)```python\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
            above = text[: match.start()].splitlines()
            mark = next((m[1] for m in map(MARK.match, reversed(above[-2:])) if m), "")
            raises = re.search(r"\braises (\w+)", mark)
            reason = re.match(r"not run, because (.+)", mark)
            framework = re.match(r"(torch|keras)\b", mark)
            found.append(
                Block(
                    page.name,
                    len(above) + 1,
                    textwrap.dedent(match[2]),
                    framework[1] if framework else PAGES.get(page.name, ""),
                    raises[1] if raises else None,
                    reason[1] if reason else None,
                )
            )
    return found


def torch_names() -> dict[str, Any]:
    """What the blocks of PyTorch take for granted."""
    import horovod.torch as hvd
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    data = TensorDataset(torch.randn(8, 3, 4, 4))
    x = torch.randn(4, 64, 3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    names = {
        "hvd": hvd,
        "torch": torch,
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        "train_epoch": lambda model, optimizer: torch.tensor(1.0),
        "epochs": 2,
        "loader": DataLoader(data, 4),
        "x": x,
        "z": x,
        "shortcut": x,
    }
    if hvd.is_initialized():
        names["sampler"] = hvd.elastic.ElasticSampler(data)
        names["state"] = hvd.elastic.TorchState(model=model)
    return names


def keras_names() -> dict[str, Any]:
    """What the blocks of Keras take for granted."""
    import keras
    import numpy as np
    import tensorflow as tf

    import hvd_syncbn.keras as hvd

    def make_model() -> Any:
        layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(synchronized=True), keras.layers.Dense(1)]
        return keras.Sequential([keras.Input((3,)), *layers])

    model = make_model()
    if hvd.is_initialized():
        model = hvd.convert_sync_batchnorm(model)
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
        model.save("checkpoint.keras")
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(4)
    keras_layer = keras.layers.BatchNormalization()
    keras_layer.build((None, 3))
    names = {
        "hvd": hvd,
        "keras": keras,
        "tf": tf,
        "make_model": make_model,
        "model": model,
        "loss": "mse",
        "data": data,
        "batches": data,
        "steps": 4,
        "epochs": 2,
        "x": x,
        "keras_layer": keras_layer,
    }
    if importlib.util.find_spec("torch") is not None:
        names["torch_layer"] = importlib.import_module("torch").nn.BatchNorm1d(3)
    return names


def run(block: Block) -> None:
    """Executes a block in a process of its framework, and raises what it raises."""
    hvd = importlib.import_module("horovod.torch" if block.framework == "torch" else "horovod.tensorflow")
    names: dict[str, Any] = {}
    if "hvd.init(" not in block.source:
        hvd.init(process_sets="dynamic")
    if block.framework:
        names = torch_names() if block.framework == "torch" else keras_names()
        if not re.search(r"^\s*(from|import) hvd_syncbn", block.source, re.MULTILINE):
            face = importlib.import_module(f"hvd_syncbn.{block.framework}")
            names |= {name: getattr(face, name) for name in face.__all__}
    try:
        exec(compile(block.source, block.name, "exec"), names)
        if "train" in names and "\ntrain(" not in block.source:
            names["train"](names.get("state") or torch_names()["state"])
    finally:
        hvd.shutdown()


def main() -> None:
    os.chdir(tempfile.mkdtemp())
    for number, block in enumerate(blocks()):
        if (block.framework or "torch") == sys.argv[1] and block.reason is None:
            error = None
            try:
                run(block)
            except Exception:
                error = traceback.format_exc()
            print(json.dumps({"number": number, "error": error}), flush=True)


if __name__ == "__main__":
    main()
