"""torch.compile with CUDA graphs gives the bytes of eager execution, at replays, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvd_syncbn.torch import SyncBatchNorm
from tests.torch_tools import LAYOUTS, assert_same, in_layout, randn, randomize, step


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reduce_overhead(layout: str) -> None:
    torch._dynamo.reset()
    eager = randomize(SyncBatchNorm(12, activation="relu"), 1).cuda()
    twin = SyncBatchNorm(12, activation="relu").cuda()
    twin.load_state_dict(eager.state_dict())
    compiled = torch.compile(twin, mode="reduce-overhead", fullgraph=True)

    def on_cpu(module: torch.nn.Module, tensors: list[Tensor]) -> dict[str, Tensor]:
        return {name.replace("_orig_mod.", ""): value.cpu() for name, value in step(module, *tensors).items()}

    for i in range(4):  # warm-up, capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        tensors = [in_layout(randn(10 * i + seed, 8, 12, 9, 9), layout).cuda() for seed in range(3)]
        assert_same(on_cpu(compiled, tensors), on_cpu(eager, tensors), f"step {i}:")
