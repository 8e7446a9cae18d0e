"""What every launcher here starts: a training step of five synchronized layers, the batch dealt out unevenly to the ranks.

Its sha256 of outputs, input gradients and running statistics is the same from any launcher, on any number of ranks, and that of
one process: ``python job.py``.
"""

from __future__ import annotations

import numpy as np


def train() -> tuple[int, str]:
    """One rank's work: which rank it was, and what all of them found together."""
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
    # Running statistics are every rank's own, and have to be the same.
    digests = {vectors.digest(y, dx, running) for *_, running in parts}
    sha256 = digests.pop() if len(digests) == 1 else "differs"
    over = "MPI" if hvd.mpi_built() and hvd.mpi_enabled() else "Gloo"
    rank, words = hvd.rank(), f"{sha256} {hvd.size()} {over}"
    hvd.shutdown()
    return rank, words


if __name__ == "__main__":
    rank, words = train()
    if rank == 0:
        print(f"launched: {words}", flush=True)
