"""The same in accelerate: torchrun --nproc-per-node 2 examples/torchrun/with_accelerate.py"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader
from with_ddp import dataset, network

from hvd_syncbn.torch import convert_sync_batchnorm

if __name__ == "__main__":
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    data = dataset()
    model = convert_sync_batchnorm(network())  # before prepare(), which wraps it in DistributedDataParallel
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, 4))
    for _ in range(3):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    norm = accelerator.unwrap_model(model)[1]
    accelerator.print(f"{accelerator.num_processes} ranks, running mean {norm.running_mean.tolist()[:2]}")
    accelerator.end_training()
