"""One rank of a job that does not end well, for test_faults.py: what befalls it, and a folder for what each rank saw."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch

from hvd_syncbn.torch import SyncBatchNorm


def main() -> None:
    """The rank."""
    fault, folder = sys.argv[1], Path(sys.argv[2])
    hvd.init()
    layer = SyncBatchNorm(3)
    for number in range(600):
        try:
            y = layer(torch.ones(2, 3, requires_grad=True) * hvd.rank())
            if fault == "exception" and number == 3 and hvd.rank() == 1:
                raise RuntimeError("an error between forward and backward")
            y.sum().backward()
            layer.zero_grad()
        except hvd.mpi_ops.HorovodInternalError as error:
            (folder / f"error{hvd.rank()}").write_text(str(error))
            raise
        (folder / f"rank{hvd.rank()}").write_text(f"{os.getpid()} {number}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
