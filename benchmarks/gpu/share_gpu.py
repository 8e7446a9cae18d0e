"""`verify` on ranks that share one GPU: `horovodrun -np 2 python -m benchmarks.gpu.share_gpu`.

NCCL refuses ranks that share a GPU, so a Horovod with NCCL says here that it has none: packets then go through host memory.
"""

from __future__ import annotations

import sys
from typing import Any

import horovod.torch as hvd

from hvd_syncbn import vectors
from hvd_syncbn.cli import rank
from hvd_syncbn.cli.stacks import reference_stack


def main() -> None:
    """Compare every split of the batch and layout, on the CPU and on the GPU, with the reference."""
    hvd.nccl_built = lambda: False
    hvd.init()
    want = vectors.digest(*reference_stack())
    found: dict[str, str] = {}

    def collect(hvd: Any, **values: Any) -> None:
        if "sha256" in values:
            found[values["configuration"]] = values["sha256"]

    rank.report = collect
    rank.splits(hvd, "torch")
    hvd.shutdown()
    on_gpu = [name for name in found if name.endswith(", GPU")]
    different = [name for name, sha256 in found.items() if sha256 != want]
    print(f"{len(found)} configurations, {len(on_gpu)} on the GPU; different: {different or 'none'}", flush=True)
    sys.exit(1 if different or not on_gpu else 0)


if __name__ == "__main__":
    main()
