"""A user's typed script with PyTorch's face, checked by `mypy --strict` in tests/unit/test_typing.py, not run."""

from collections.abc import Iterator
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from typing_extensions import assert_type  # in typing from Python 3.11 on

from hvd_syncbn.exchange import BatchNormState
from hvd_syncbn.torch import (
    Diagnosis,
    SyncBatchNorm,
    SyncBatchNorm2d,
    accumulate_statistics,
    check_device_errors,
    check_ranks_agree,
    convert_sync_batchnorm,
    diagnose,
    fold_batchnorm,
    freeze_batchnorm,
    get_state,
    groups,
    recalibrate,
    revert_sync_batchnorm,
    set_state,
    sync_batch_norm,
    take_part,
    unfreeze_batchnorm,
)


class Block(nn.Module):
    """A user's model is of the user's class before and after everything."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = SyncBatchNorm(channels, momentum=None, activation="relu", process_set=hvd.global_process_set)
        self.local: nn.BatchNorm2d = SyncBatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        assert_type(self.norm.running_mean, Tensor | None)
        assert_type(self.norm.forward(x, residual=x), Tensor)
        y: Tensor = self.norm(self.conv(x), residual=x)  # PyTorch says nothing of what modules return
        return y


class Doubled(SyncBatchNorm):
    """A class of one's own."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x, residual) * 2


def batches() -> Iterator[Tensor]:
    yield torch.ones(2, 8, 4, 4)


def main() -> None:
    hvd.init()
    model = convert_sync_batchnorm(Block(8), process_set=groups(8).mine)
    assert_type(model, Block)
    assert_type(revert_sync_batchnorm(model), Block)
    assert_type(freeze_batchnorm(model, affine=True), Block)
    assert_type(unfreeze_batchnorm(model), Block)
    assert_type(recalibrate(model, batches(), estimator="batches", progress=False), Block)
    assert_type(accumulate_statistics(model, 4), Block)
    assert_type(diagnose(model, batches()), Diagnosis)
    assert_type(take_part(model), Tensor)
    check_ranks_agree(model, torch.optim.SGD(model.parameters(), lr=0.1), local=[model.local])
    fold_batchnorm(model.eval())(torch.ones(2, 8, 4, 4))
    state = get_state(model.norm)
    assert_type(state, BatchNormState)
    set_state(Doubled(8), state)
    y: Tensor = sync_batch_norm(torch.ones(2, 8), None, None, torch.ones(8), torch.zeros(8), training=True)
    check_device_errors()
    options: dict[str, Any] = {"eps": 1e-3}
    y = Doubled(8, **options)(y)

    # What is wrong is seen: an unused ignore would be an error, too.
    recalibrate(model, batches(), estimater="batches")  # type: ignore[call-arg]
    SyncBatchNorm("8")  # type: ignore[arg-type]
    convert_sync_batchnorm(3)  # type: ignore[type-var]
    count: int = model.norm.weight  # type: ignore[assignment]
    print(count)


if __name__ == "__main__":
    main()
