"""One worker of an elastic job that has one value per channel on each rank: see test_elastic_one_value.py.

python -m tests.parallel.checks.elastic_one_value FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch

from hvd_syncbn.torch import SyncBatchNorm

STEPS, DIES_AT = 8, 3


def main() -> None:
    killed = Path(sys.argv[1]) / "killed"
    hvd.init()
    layer = SyncBatchNorm(3)
    layer.collective_name = "pooling"
    state = hvd.elastic.TorchState(model=layer, step=0)

    @hvd.elastic.run
    def train(state: Any) -> None:
        while state.step < STEPS:
            if state.step == DIES_AT and hvd.rank() == 1 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            layer(torch.tensor([[1.0, 2.0, 3.0]]) * (hvd.rank() + state.step))
            state.step += 1
            state.commit()

    train(state)
    print(f"rank {hvd.rank()} of {hvd.size()} is at step {state.step}", flush=True)


if __name__ == "__main__":
    main()
