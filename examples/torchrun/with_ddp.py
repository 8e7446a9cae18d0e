"""A classifier trained with DistributedDataParallel: torchrun --nproc-per-node 2 examples/torchrun/with_ddp.py"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from hvd_syncbn.torch import convert_sync_batchnorm  # before: torch.nn.SyncBatchNorm.convert_sync_batchnorm


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )


def dataset() -> TensorDataset:
    """Dark and bright images."""
    labels = torch.arange(64) % 2
    return TensorDataset(torch.randn(64, 1, 8, 8) + labels.reshape(-1, 1, 1, 1), labels)


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    data = dataset()
    model = DistributedDataParallel(convert_sync_batchnorm(network()))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    sampler = DistributedSampler(data)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for images, labels in DataLoader(data, 4, sampler=sampler):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, running mean {model.module[1].running_mean.tolist()[:2]}, loss {loss:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
