"""The same step several times with a DistributedOptimizer of PyTorch; see test_repeats.py."""

from __future__ import annotations

import os
from collections.abc import Sequence

import horovod.torch as hvd
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tests.parallel.shared import repeats


def train(gradients: repeats.Gradients, delay: float) -> Sequence[NDArray[np.float32]]:
    parameters = nn.ParameterList(torch.zeros(gradient.shape) for gradient in gradients)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters.parameters(), 0.1),
        named_parameters=parameters.named_parameters(),
        num_groups=int(os.environ.get("REPEATS_GROUPS", "0")),
    )
    for parameter in parameters:
        parameter.register_hook(lambda gradient: repeats.sleep(delay))
    loss = sum((p * torch.from_numpy(g)).sum() for p, g in zip(parameters, gradients, strict=True))
    loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    return [parameter.detach().numpy() for parameter in parameters]


def check_repeats() -> list[str]:
    return repeats.digests(hvd, train)
