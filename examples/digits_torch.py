"""Train a small network on handwritten digits with PyTorch and Horovod; `demo.py` runs it in three ways.

    horovodrun -np 2 -H localhost:2 python examples/digits_torch.py --layer sync --epochs 3

To use hvd-syncbn, a job adds `model = convert_sync_batchnorm(model)` or uses the layer directly, as here.
"""

from __future__ import annotations

import digits
import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_syncbn.torch import SyncBatchNorm, revert_sync_batchnorm


class Net(nn.Module):
    """Three convolutions, one with a shortcut, and two fully connected layers. A norm follows each layer but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = SyncBatchNorm(16, activation="relu")
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = SyncBatchNorm(32, activation="relu")
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn3 = SyncBatchNorm(32, activation="relu")
        self.fc1 = nn.Linear(32 * 4 * 4, 64, bias=False)
        self.bn4 = SyncBatchNorm(64, activation="relu")
        self.fc2 = nn.Linear(64, digits.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores [n, 10] of images [n, 1, 8, 8]."""
        x = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        x = self.bn3(self.conv3(x), residual=x)
        return self.fc2(self.bn4(self.fc1(x.flatten(1))))


def main() -> None:
    """Train on one rank."""
    args = digits.arguments()
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(digits.SEED)
    x_train, y_train, x_test, y_test = digits.data()
    images, labels = torch.from_numpy(x_train).movedim(-1, 1), torch.from_numpy(y_train)

    model: nn.Module = Net()
    if args.layer == "local":
        model = revert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for batch in digits.epoch_order(epoch, len(images)):
            mine = torch.from_numpy(digits.share(batch, hvd.rank(), hvd.size()))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[mine]), labels[mine])
            loss.backward()
            optimizer.step()
            total += loss.item()
        model.eval()
        with torch.no_grad():
            accuracy = (model(torch.from_numpy(x_test).movedim(-1, 1)).argmax(1).numpy() == y_test).mean()
        steps = len(images) // digits.GLOBAL_BATCH
        loss = hvd.allreduce(torch.tensor(total / steps), name="loss")
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1}/{args.epochs} loss {loss:.4f} accuracy {accuracy:.4f}", flush=True)


if __name__ == "__main__":
    main()
