"""One rank of a torchrun job on several hosts: prints its host, its group of ``groups()``, and the digest of the stack there.

Every group has the whole batch of ``vectors.py``, split unevenly between its ranks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hvd_syncbn import vectors
from hvd_syncbn.cli import stacks
from hvd_syncbn.torch import groups


def main() -> None:
    """Run one rank."""
    sys.modules["horovod"] = None  # type: ignore[assignment]  # to import it is an error
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mine = groups().mine
    members = dist.get_process_group_ranks(mine)
    samples = vectors.split(len(members), "uneven")[members.index(dist.get_rank())]
    y, dx, running = stacks.torch_stack(samples, "channels_last", process_set=mine)
    parts: list[Any] = [None] * len(members)
    dist.all_gather_object(parts, (y, dx), group=mine)
    digest = vectors.digest(*(np.concatenate([part[i] for part in parts]) for i in (0, 1)), running)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), members, digest))
    if dist.get_rank() == 0:
        print(json.dumps(everyone), flush=True)
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
