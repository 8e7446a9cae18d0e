"""The same in Lightning, which converts the model itself: python examples/torchrun/with_lightning.py"""

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import LayerSync
from torch import Tensor
from torch.utils.data import DataLoader
from with_ddp import dataset, network

from hvd_syncbn.torch import convert_sync_batchnorm, revert_sync_batchnorm


class SyncBatchNorms(LayerSync):
    """Takes the place of `Trainer(sync_batchnorm=True)`, which converts with torch.nn.SyncBatchNorm."""

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        return convert_sync_batchnorm(model)

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        return revert_sync_batchnorm(model)


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


if __name__ == "__main__":
    lightning.seed_everything(0)
    model = Classifier()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, plugins=[SyncBatchNorms()], **quiet)
    trainer.fit(model, DataLoader(dataset(), 4))
    if trainer.is_global_zero:
        print(f"{trainer.world_size} ranks, running mean {model.network[1].running_mean.tolist()[:2]}")
