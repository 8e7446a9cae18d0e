"""A training script to start from: PyTorch under Horovod with synchronized batch normalization. See docs/templates.md.

    python train_pytorch.py                                  # one rank
    horovodrun -np 2 python train_pytorch.py                 # two ranks; -H h1:2,h2:2 for other hosts
    horovodrun -np 2 python train_pytorch.py --resume        # resumes from the last checkpoint
    horovodrun -np 2 --min-np 1 -H localhost:1,127.0.0.1:1 --network-interfaces lo python train_pytorch.py --elastic

Replace `data`, `network` and the numbers below.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from hvd_syncbn.torch import convert_sync_batchnorm, recalibrate

SEED = 1
RATE = 0.02  # learning rate of one rank; multiplied by the number of ranks
WARMUP = 2  # epochs until the learning rate reaches its maximum
DECAY = 1e-4
COMMIT = 10  # steps between two commits of an elastic job

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16, help="samples per rank and step")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of checkpoint.pt and model.pt")
    parser.add_argument("--resume", action="store_true", help="resume from checkpoint.pt, if it exists")
    parser.add_argument("--amp", action="store_true", help="mixed precision: autocast to bfloat16")
    parser.add_argument("--elastic", action="store_true", help="continue when ranks die, leave or join")
    parser.add_argument("--recalibrate", action="store_true", help="at the end use the statistics of all training data")
    return parser.parse_args()


def data() -> list[Subset[Any]]:
    """Return the training and test samples, the same on every rank; the code below splits them."""
    digits = load_digits()
    samples = TensorDataset(torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target))
    return random_split(samples, [1440, 357], torch.Generator().manual_seed(SEED))


def network() -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    return nn.Sequential(block(1, 16, 1), block(16, 32, 2), block(32, 32, 2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 10))


def learning_rate(epoch: float, epochs: int) -> float:
    """Return the learning rate: linear warm-up from one rank's to that of all ranks, cosine decay to zero."""
    scale = 1 + (hvd.size() - 1) * min(1.0, epoch / WARMUP)
    return RATE * scale * (1 + math.cos(math.pi * min(1.0, epoch / epochs))) / 2


def train(state: Any, loader: DataLoader[Any], test: Subset[Any], args: argparse.Namespace) -> None:
    """Train from the position of `state`. An elastic job calls this again whenever its ranks have changed."""
    model, optimizer, sampler = state.net, state.sgd, state.sampler
    while sampler.epoch < args.epochs:
        model.train()
        # For dropout: different numbers on every rank and in every epoch, and the same when an epoch is resumed.
        torch.manual_seed(SEED + sampler.epoch * hvd.size() + hvd.rank())
        for step, (x, y) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(sampler.epoch + sampler.processed_num / len(sampler.dataset), args.epochs)
            optimizer.zero_grad()
            loss(model, x, y, args.amp).mean().backward()
            optimizer.step()
            sampler.record_batch(step, len(x))
            if args.elastic and (step + 1) % COMMIT == 0:
                state.commit()  # survivors continue from here
        sampler.set_epoch(sampler.epoch + 1)
        report(f"epoch {sampler.epoch}/{args.epochs}", model, test, args)
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sampler": sampler.state_dict()}
        write(args.out / "checkpoint.pt", saved)
        if args.elastic:
            state.commit()


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor, amp: bool) -> torch.Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):  # bfloat16 needs no loss scaling
        return F.cross_entropy(model(x.to(device)), y.to(device), reduction="none")


def report(title: str, model: nn.Module, test: Subset[Any], args: argparse.Namespace) -> None:
    """Evaluate this rank's share and print the result of all ranks. The ranks add sums, so shares may be uneven."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)  # loss, hits, samples
    share = Subset(test, range(hvd.rank(), len(test), hvd.size()))
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
        for x, y in DataLoader(share, 256):
            scores, y = model(x.to(device)).float(), y.to(device)
            hits = (scores.argmax(1) == y).sum()
            sums += torch.tensor([F.cross_entropy(scores, y, reduction="sum"), hits, len(y)])
    sums = hvd.allreduce(sums, op=hvd.Sum, name="evaluation")
    if hvd.rank() == 0:
        print(f"{title}: loss {sums[0] / sums[2]:.6f}, {sums[1]:.0f} of {sums[2]:.0f} correct", flush=True)


def write(path: Path, content: Any) -> None:
    """Write a file on rank 0. The file at `path` is always complete, even if the job is killed."""
    if hvd.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, part := path.with_suffix(".part"))
        os.replace(part, path)


def main() -> None:
    args = arguments()
    hvd.init()
    if device.type == "cuda":
        torch.cuda.set_device(hvd.local_rank())
    torch.manual_seed(SEED)
    training, test = data()
    model = convert_sync_batchnorm(network()).to(device)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=DECAY)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    sampler = hvd.elastic.ElasticSampler(training, seed=SEED)  # shuffles, shards and records progress
    loader = DataLoader(training, args.batch_size, sampler=sampler)
    # The optimizer before the model: if it has no momentum yet, Horovod creates it by a step, which decays the weights.
    state = hvd.elastic.TorchState(sgd=optimizer, net=model, sampler=sampler)

    checkpoint = args.out / "checkpoint.pt"
    if args.resume and hvd.rank() == 0:  # broadcast to the other ranks below
        if checkpoint.exists():
            saved = torch.load(checkpoint, map_location=device, weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            sampler.load_state_dict(saved["sampler"])
        print(f"{'resuming from' if checkpoint.exists() else 'starting: there is no'} {checkpoint}", flush=True)
    if args.elastic:
        state.save()  # restored if a rank dies before the first commit
        hvd.elastic.run(train)(state, loader, test, args)
    else:
        state.sync()
        train(state, loader, test, args)

    if args.recalibrate:
        sampler.set_epoch(0)
        recalibrate(model, loader)
    report("final result", model, test, args)
    write(args.out / "model.pt", model.state_dict())  # can be loaded into the model of `network` without hvd_syncbn
    hvd.barrier()  # the first rank that ends shuts Horovod down for all


if __name__ == "__main__":
    main()
