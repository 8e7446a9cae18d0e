"""One rank of a job that does not end well, for test_faults.py.

Arguments: framework, what befalls it, a folder for what each rank saw.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from horovod.common.exceptions import HorovodInternalError

from hvd_syncbn import horovod


def torch_step() -> Callable[[Callable[[], None]], None]:
    """A step of training in PyTorch, which calls what it is given between forward and backward."""
    import torch

    from hvd_syncbn.torch import SyncBatchNorm

    layer = SyncBatchNorm(3)

    def step(between: Callable[[], None]) -> None:
        y = layer(torch.ones(2, 3, requires_grad=True))
        between()
        y.sum().backward()

    return step


def tensorflow_step() -> Callable[[Callable[[], None]], None]:
    """The same in Keras."""
    import tensorflow as tf

    from hvd_syncbn.keras import SyncBatchNormalization

    layer = SyncBatchNormalization()
    x = tf.ones((2, 3))

    def step(between: Callable[[], None]) -> None:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        between()
        tape.gradient(y, x)

    return step


def main() -> None:
    """The rank."""
    framework, fault, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    hvd: Any = horovod.load(framework)
    hvd.init()
    step = torch_step() if framework == "torch" else tensorflow_step()

    def between() -> None:
        if fault == "exception" and number == 3 and hvd.rank() == 1:
            raise RuntimeError("an error between forward and backward")

    for number in range(600):
        try:
            step(between)
        except HorovodInternalError as error:
            (folder / f"error{hvd.rank()}").write_text(str(error))
            raise
        (folder / f"rank{hvd.rank()}").write_text(f"{os.getpid()} {number}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
