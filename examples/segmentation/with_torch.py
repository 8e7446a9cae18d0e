"""Segment photographs with PyTorch and Horovod, one patch per rank and step; `run.py` runs it with each kind of norm.

horovodrun -np 4 -H localhost:4 python examples/segmentation/with_torch.py --layer sync --out out/run.npz
"""

from __future__ import annotations

import horovod.torch as hvd
import photos
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_syncbn.torch import convert_sync_batchnorm


def block(inputs: int, outputs: int, **options: int) -> nn.Sequential:
    """Return a convolution, a norm and relu."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """A small U-Net: down to a quarter of the size, dilated convolutions, and up again with skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.at_full = block(1, 16, padding=1)
        self.at_half = block(16, 32, stride=2, padding=1)
        self.at_quarter = block(32, 64, stride=2, padding=1)
        self.wide = nn.Sequential(block(64, 64, padding=2, dilation=2), block(64, 64, padding=4, dilation=4))
        self.up_half = block(64 + 32, 32, padding=1)
        self.up_full = block(32 + 16, 16, padding=1)
        self.head = nn.Conv2d(16, len(photos.CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores [n, 3, height, width] of images [n, 1, height, width]."""
        full = self.at_full(x)
        half = self.at_half(full)
        x = self.wide(self.at_quarter(half))
        x = self.up_half(torch.cat([F.interpolate(x, scale_factor=2.0), half], 1))
        x = self.up_full(torch.cat([F.interpolate(x, scale_factor=2.0), full], 1))
        return self.head(x)


def main() -> None:
    """Train on one rank."""
    args = photos.arguments()
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(photos.SEED)
    train, test = photos.load()
    x, y = (torch.from_numpy(array) for array in photos.patches(train, hvd.rank(), hvd.size()))
    x = x.movedim(-1, 2)

    model = Net()
    if args.layer == "sync":
        convert_sync_batchnorm(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    scores = photos.Scores(test)
    for step in range(photos.STEPS):
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x[step]), y[step]).backward()
        optimizer.step()
        if (step + 1) % photos.ROUND == 0 and hvd.rank() == 0:
            model.eval()
            with torch.no_grad():
                found = [model(torch.from_numpy(gray).movedim(-1, 0)[None])[0].argmax(0).numpy() for gray, _ in test]
            print(scores.add(found), flush=True)
    if hvd.rank() == 0:
        scores.save(args.out)
    hvd.barrier()  # the first rank that ends shuts Horovod down for all


if __name__ == "__main__":
    main()
