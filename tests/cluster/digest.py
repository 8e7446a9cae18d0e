"""One rank of a job that says what the stack of vectors.py gives in a framework: split -> sha256, from rank 0, to a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from hvd_syncbn import horovod, vectors
from hvd_syncbn.cli.stacks import tensorflow_stack, torch_stack


def main() -> None:
    """The rank."""
    framework, path = sys.argv[1], Path(sys.argv[2])
    hvd = horovod.load(framework)
    hvd.init()
    stack = torch_stack if framework == "torch" else tensorflow_stack
    digests = {}
    for split in vectors.SPLITS:
        mine = vectors.split(hvd.size(), split)[hvd.rank()]
        y, dx, running = stack(mine, "channels_first")
        parts = hvd.allgather_object((mine, y, dx))
        order = np.argsort([sample for samples, _, _ in parts for sample in samples])
        y_all, dx_all = (np.concatenate([part[i] for part in parts])[order] for i in (1, 2))
        digests[split] = vectors.digest(y_all, dx_all, running)
    hosts = sorted(set(hvd.allgather_object((hvd.cross_rank(), hvd.local_rank(), hvd.cross_size(), hvd.local_size()))))
    if hvd.rank() == 0:
        path.write_text(json.dumps({"size": hvd.size(), "ranks": hosts, "digests": digests}))
    hvd.shutdown()


if __name__ == "__main__":
    main()
