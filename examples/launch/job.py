"""Run a training step of five synchronized layers, with an uneven split of the batch: the job of every launcher here.

The sha256 of outputs, input gradients and running statistics is the same for every launcher and any number of ranks, and for
one process: ``python job.py``.
"""

from __future__ import annotations

import numpy as np


def train() -> tuple[int, str]:
    """Run one rank; return its number, and the sha256, number of ranks and transport of the job."""
    import horovod.torch as hvd
    import torch

    from hvd_syncbn import vectors
    from hvd_syncbn.cli.stacks import torch_stack

    torch.set_num_threads(1)
    hvd.init()
    mine = vectors.split(hvd.size(), "uneven")[hvd.rank()]
    parts = hvd.allgather_object((mine, *torch_stack(mine, "channels_last")))
    order = np.argsort([sample for samples, *_ in parts for sample in samples])
    y, dx = (np.concatenate([part[i] for part in parts])[order] for i in (1, 2))
    # Every rank has its own running statistics, which must be equal.
    digests = {vectors.digest(y, dx, running) for *_, running in parts}
    sha256 = digests.pop() if len(digests) == 1 else "differs"
    over = "MPI" if hvd.mpi_built() and hvd.mpi_enabled() else "Gloo"
    rank, report = hvd.rank(), f"{sha256} {hvd.size()} {over}"
    hvd.shutdown()
    return rank, report


if __name__ == "__main__":
    rank, report = train()
    if rank == 0:
        print(f"launched: {report}", flush=True)
