"""Ranks without input for a part of the network, and micro-batches, in PyTorch; see test_loops.py."""

from __future__ import annotations

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from hvd_syncbn import vectors
from hvd_syncbn.torch import (
    SyncBatchNorm,
    accumulate_statistics,
    convert_sync_batchnorm,
    diagnose,
    freeze_batchnorm,
    recalibrate,
    take_part,
)
from tests.torch_tools import assert_same, error_of, randn, randomize

RANK, SIZE = hvd.rank(), hvd.size()
ALONE = [hvd.add_process_set([rank]) for rank in range(SIZE)][RANK] if SIZE > 1 else None
SAMPLES = vectors.SAMPLES


class Head(nn.Module):
    """Runs one of its layers twice, and one in bfloat16."""

    def __init__(self, process_set: object = None) -> None:
        super().__init__()
        self.last, self.twice, self.first = (nn.BatchNorm1d(4) for _ in range(3))
        randomize(convert_sync_batchnorm(self, process_set))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(x))).bfloat16()
        return self.last(x).float()

    def take_part(self) -> Tensor:
        """With a layer that runs twice: each call in its turn."""
        return take_part(self.first, self.twice, self.twice, self.last)


def inputs(step: int) -> tuple[Tensor, list[int]]:
    """The global batch of a head, and this rank's part of it: nothing on one rank, another one in each step."""
    share = vectors.split(SIZE - 1, "uneven") if SIZE > 1 else []
    share.insert(step % SIZE, [])
    return randn(step + 10, SAMPLES, 4), share[RANK]


def check_a_rank_with_nothing() -> None:
    """Outputs, input gradients and running statistics have the bytes of one process that has all samples."""
    ours, whole = Head(), Head(ALONE)
    for step in range(SIZE + 1):
        x, mine = inputs(step)
        if SIZE == 1:
            mine = list(range(SAMPLES))
        x.requires_grad_()
        y = whole(x)
        y.square().sum().backward()
        my_x = x.detach()[mine].requires_grad_()
        zero = torch.zeros(())
        if len(mine):
            my_y = ours(my_x)
            my_y.square().sum().backward()
            assert x.grad is not None
            assert_same([my_y, my_x.grad], [y[mine], x.grad[mine]])
        else:
            zero = ours.take_part()
            zero.backward()
            assert all(
                p.grad is not None and not p.grad.any() for n in (ours.first, ours.twice, ours.last) for p in n.parameters()
            )
        assert zero == 0
        assert_same(dict(ours.named_buffers()), dict(whole.named_buffers()))
        ours.zero_grad()


def check_training_with_an_optimizer() -> None:
    """Every rank has a gradient for every parameter, and all of them are those of one process."""

    class Swapped(nn.Module):
        """Holds its layers in another order than that in which it runs them."""

        def __init__(self) -> None:
            super().__init__()
            self.b, self.a = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x).tanh())
            return y

    def network(process_set: object) -> nn.ModuleList:
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        head = nn.Sequential(nn.Linear(4, 4), Swapped(), nn.Linear(4, 1))
        return convert_sync_batchnorm(nn.ModuleList([trunk, head]).double(), process_set)

    def loss(model: nn.ModuleList, x: Tensor, boxes: Tensor) -> Tensor:
        found = model[0](x)
        total = found.sin().sum()
        return total + (model[1](found[boxes]).square().sum() if len(boxes) else take_part(model[1]))

    ours, whole = network(None), network(ALONE)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(ours.parameters(), 0.1), named_parameters=ours.named_parameters(), op=hvd.Sum
    )
    reference = torch.optim.SGD(whole.parameters(), 0.1)
    for step in range(3):
        x = randn(step, SAMPLES, 4, dtype=torch.float64)
        samples = vectors.split(SIZE, "uneven")
        boxes = [[] if rank == step % SIZE and SIZE > 1 else list(range(0, len(mine), 2)) for rank, mine in enumerate(samples)]
        order = [sample for mine in samples for sample in mine]
        starts = [sum(map(len, samples[:rank])) for rank in range(SIZE)]
        everyone = torch.tensor([start + box for start, mine in zip(starts, boxes, strict=True) for box in mine])
        reference.zero_grad()
        loss(whole, x[order], everyone).backward()
        reference.step()
        optimizer.zero_grad()
        loss(ours, x[samples[RANK]], torch.tensor(boxes[RANK], dtype=torch.long)).backward()
        optimizer.step()
    for (name, value), expected in zip(ours.state_dict().items(), whole.state_dict().values(), strict=True):
        # In float64, where sums in another order differ by 1e-16; running statistics are float32.
        tolerance = 1e-6 if "running" in name else 1e-12
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance, msg=name)


def check_every_rank_has_nothing() -> None:
    """The layers take part and keep their statistics, as with an empty batch on every rank."""
    ours, empty = Head(), Head()
    for module in (ours, empty):
        module.zero_grad()
    empty(torch.zeros(0, 4)).sum().backward()
    ours.take_part().backward()
    assert_same(dict(ours.named_buffers()), dict(empty.named_buffers()))
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in empty.parameters()])


def check_layers_without_collectives() -> None:
    """Frozen layers and those in evaluation mode: no rank waits for another one."""
    if RANK != 0:
        return
    for head in (Head().eval(), freeze_batchnorm(Head()), freeze_batchnorm(Head(), affine=True)):
        before = {name: value.clone() for name, value in head.named_buffers()}
        zero = take_part(head)
        zero.backward()
        assert zero == 0
        assert_same(dict(head.named_buffers()), before)


def check_without_gradients() -> None:
    head, whole = Head(), Head(ALONE)
    x, mine = inputs(0)
    with torch.no_grad():
        whole(x)
        if len(mine):
            head(x[mine])
        elif SIZE == 1:
            head(x)
        else:
            assert not head.take_part().requires_grad
    assert_same(dict(head.named_buffers()), dict(whole.named_buffers()))


def check_compiled() -> None:
    """A compiled model on ranks with input; a compiled function around the call on the others."""
    head, whole = (convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4)), who) for who in (None, ALONE))
    run = torch.compile(lambda x: head(x).sum() if len(x) else take_part(head) + x.sum(), dynamic=False, backend="aot_eager")
    for step in range(3):
        x, mine = inputs(step)
        if SIZE == 1:
            mine = list(range(SAMPLES))
        whole(x)
        run(x[mine].requires_grad_()).backward()
        assert_same(dict(head.named_buffers()), dict(whole.named_buffers()))


LAYERS = {
    "plain": {},
    "average": {"momentum": None},
    "zero_debias": {"zero_debias": True},
}


def layer(process_set: object, **options: object) -> SyncBatchNorm:
    made: SyncBatchNorm = randomize(SyncBatchNorm(4, process_set=process_set, **options))
    made.collective_name = "layer"
    return made


def check_micro_batches() -> None:
    """The running statistics of k micro-batches have the bytes of one batch of all their samples."""
    for options in LAYERS.values():
        for compiled in (False, True) if not options else (False,):
            ours, whole = accumulate_statistics(layer(None, **options), 3), layer(ALONE, **options)
            run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
            for update in range(2):
                x = randn(update, 3, SAMPLES, 4, 3)
                whole(x.flatten(0, 1))
                for i, micro_batch in enumerate(x):
                    before = {
                        name: value.clone() for name, value in ours.state_dict().items() if name not in ("weight", "bias")
                    }
                    mine = micro_batch[vectors.split(SIZE, "uneven")[RANK]]
                    if i == 1:
                        with torch.no_grad():  # differs in the digest
                            run(mine)
                    else:
                        run(mine).square().sum().backward()
                    if i < 2:
                        assert_same({name: ours.state_dict()[name] for name in before}, before)
                assert_same(ours.state_dict(), whole.state_dict())
            assert ours.state_dict().keys() == whole.state_dict().keys()


def check_micro_batches_of_a_rank_with_nothing() -> None:
    ours, whole = accumulate_statistics(layer(None), 2), layer(ALONE)
    for update in range(2):
        x = randn(update, 2, SAMPLES, 4)
        whole(x.flatten(0, 1))
        for step, micro_batch in enumerate(x):
            _, mine = inputs(step)
            if SIZE == 1 or len(mine):
                ours(micro_batch[mine] if SIZE > 1 else micro_batch).sum().backward()
            else:
                take_part(ours).backward()
    assert_same(ours.state_dict(), whole.state_dict())


def check_micro_batches_end() -> None:
    """With 1, and after reverting, every step updates; what was not complete is discarded."""
    ours, whole = accumulate_statistics(layer(None), 3), layer(ALONE)
    x = randn(1, SAMPLES, 4)
    mine = vectors.split(SIZE, "uneven")[RANK]
    ours(x[mine])
    accumulate_statistics(ours, 1)
    ours(x[mine])
    whole(x)
    assert_same(ours.state_dict(), whole.state_dict())


def check_backward_passes_per_step() -> None:
    """With Horovod's gradient accumulation: one update of the statistics for each step of the optimizer."""
    ours, whole = accumulate_statistics(layer(None), 2), layer(ALONE)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(ours.parameters(), 0.1), named_parameters=ours.named_parameters(), backward_passes_per_step=2
    )
    for step in range(2):
        x = randn(step, 2, SAMPLES, 4)
        whole(x.flatten(0, 1))
        optimizer.zero_grad()
        for micro_batch in x:
            ours(micro_batch[vectors.split(SIZE, "uneven")[RANK]]).square().sum().backward()
        optimizer.step()
    assert int(ours.num_batches_tracked) == 2
    assert_same([ours.running_mean, ours.running_var], [whole.running_mean, whole.running_var])


def check_diagnose() -> None:
    """The same on every rank, from all ranks' data; a rank with other statistics is named."""
    model, whole = (nn.Sequential(layer(who), layer(who)) for who in (None, ALONE))
    for name, norm in model.named_children():
        norm.collective_name = name
    batches = [randn(i, SAMPLES, 4, 3) for i in range(3)]
    mine = vectors.split(SIZE, "uneven")[RANK]
    found = diagnose(model, [batch[mine] for batch in batches])
    everyone = hvd.allgather_object(str(found), name="diagnoses")
    assert everyone == [str(found)] * SIZE
    recalibrate(whole, batches, process_set=ALONE)
    expected = diagnose(whole, batches, process_set=ALONE)
    assert not any(layer.is_off for layer in expected.layers)
    recalibrate(model, [batch[mine] for batch in batches])
    found = diagnose(model, [batch[mine] for batch in batches])
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.shift is not None and other.shift is not None
        assert one.shift.tobytes() == other.shift.tobytes()
    if SIZE > 1 and RANK == 1:
        with torch.no_grad():
            model[1].running_mean += 1
    found = diagnose(model)
    assert [layer.differing_ranks for layer in found.layers] == [(), (1,) if SIZE > 1 else ()]
    if SIZE > 1:
        assert found.advice[0].startswith("The ranks have different running statistics in '1'. Broadcast the model")


def check_diagnose_fails_together() -> None:
    """What one rank raises ends the others, too, and a rank with another model is an error on every rank."""
    model = nn.Sequential(layer(None))
    if SIZE == 1:
        return
    for batches, message in (([torch.zeros(3, 5)], "channels"), (3, "iterable of batches")):
        error = error_of(lambda batches=batches: diagnose(model, batches if RANK == 0 else [randn(1, 3, 4)]))
        assert message in str(error), error
        assert RANK == 0 or "diagnose failed on rank 0" in str(error), error
    error = error_of(lambda: diagnose(model if RANK == 0 else nn.Sequential(layer(None), layer(None))))
    assert "the ranks disagree: the batch norms of the model must be the same on every rank" in str(error), error
