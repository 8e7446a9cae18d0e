"""What the adapter asks of Horovod and of the other ranks."""

from __future__ import annotations

import pickle
from typing import Any

import torch

from hvd_syncbn import horovod


def gather(value: object, name: str, process_set: Any) -> tuple[list[Any], Any, Any]:
    """Return the values of all ranks, Horovod and the process set."""
    hvd = horovod.require("torch")
    process_set = process_set or hvd.global_process_set
    if horovod.size(hvd, process_set) == 1:
        return [value], hvd, process_set
    # Horovod's allgather_object has no process_set argument in PyTorch.
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = hvd.allgather(torch.tensor([len(data)]), name=f"hvd_syncbn.{name}.sizes", process_set=process_set)
    everyone = hvd.allgather(data, name=f"hvd_syncbn.{name}", process_set=process_set)
    return [pickle.loads(part.numpy().tobytes()) for part in everyone.split(sizes.tolist())], hvd, process_set
