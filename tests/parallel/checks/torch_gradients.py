"""Ranks of a PyTorch job that need different gradients, or none: the right ones, or an error on every rank.

The reference is the same layer on the whole batch, in a process set of this rank alone. See test_gradients.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_syncbn import vectors
from hvd_syncbn.torch import SyncBatchNorm, convert_sync_batchnorm, sync_batch_norm
from tests import torch_second as second
from tests.torch_tools import assert_same, randn, randomize

RANK, SIZE = hvd.rank(), hvd.size()
SINGLE = [hvd.add_process_set([rank]) for rank in range(SIZE)]
ALONE = SINGLE[RANK]
FIRST = RANK == 0
MINE = slice(3 * RANK, 3 * RANK + 3)
NAMES = ("x", "weight", "bias", "residual")


@contextlib.contextmanager
def told(*words: str) -> Iterator[None]:
    """A ValueError with these words, after which the layer goes on."""
    try:
        yield
    except ValueError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("no error")
    y = randn(7, 3 * SIZE, 5)
    assert_same(sync_batch_norm(y[MINE], None, None, name="good"), sync_batch_norm(y, None, None, process_set=ALONE)[MINE])


def layer_in(process_set: Any, **options: Any) -> SyncBatchNorm:
    layer = randomize(SyncBatchNorm(5, process_set=process_set, **options))
    layer.collective_name = "net.bn"
    return layer


def batch(seed: int) -> Tensor:
    """Of all ranks."""
    return randn(seed, 3 * SIZE, 5, 4)


def reference(seed: int, loss: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
    """This rank's part of the input gradient."""
    x = batch(seed).requires_grad_()
    loss(layer_in(ALONE, **options)(x)).backward()
    assert x.grad is not None
    return x.grad[MINE]


def square(y: Tensor) -> Tensor:
    return y.square().sum()


def exp(y: Tensor) -> Tensor:
    return y.exp().sum()


def check_each_rank_wants_another_batchs_gradient() -> None:
    layer = layer_in(None)
    a, b = batch(1)[MINE], batch(2)[MINE]
    (a if FIRST else b).requires_grad_()
    la, lb = square(layer(a)), exp(layer(b))
    la.backward()
    lb.backward()
    want = {0: reference(1, square), 1: reference(2, exp)}
    assert_same(a.grad if FIRST else b.grad, want[min(RANK, 1)])
    assert (b if FIRST else a).grad is None


def check_any_set_of_gradients() -> None:
    """Of x, weight, bias and residual: any on one rank, any on the others. Where one rank wants none and another one does, the
    others would wait for its backward pass: an error in forward."""
    values = [batch(1), randn(2, 5), randn(3, 5), batch(4)]
    dy = batch(5)

    def gradients(process_set: Any, rows: slice, wanted: tuple[bool, ...], activation: str | None) -> list[Tensor | None]:
        parts = [value[rows] if value.dim() > 1 else value for value in values]
        x, weight, bias, residual = tensors = [part.clone().requires_grad_(w) for part, w in zip(parts, wanted, strict=True)]
        y = sync_batch_norm(
            x, None, None, weight, bias, residual=residual, activation=activation, process_set=process_set, name="any"
        )
        if any(wanted):
            y.backward(dy[rows])
        return [tensor.grad for tensor in tensors]

    everything = slice(None)
    subsets = list(itertools.product((False, True), repeat=4))
    for activation in (None, "relu"):
        whole = gradients(ALONE, everything, subsets[-1], activation)
        # Parameter gradients are those of this rank's rows in the whole batch.
        own = gradients(None, MINE, subsets[-1], activation)
        for first, others in itertools.product(subsets, repeat=2):
            wanted = first if FIRST else others
            if any(first) != any(others):
                with told("the ranks disagree", "'any'", "requires_grad", f"{'a' if any(wanted) else 'no'} gradient needed"):
                    gradients(None, MINE, wanted, activation)
                continue
            got = gradients(None, MINE, wanted, activation)
            for i, name in enumerate(NAMES):
                case = f"{name} of {wanted}, {activation}"
                assert (got[i] is not None) == wanted[i], case
                if wanted[i] and name in ("x", "residual"):
                    assert_same(got[i], whole[i][MINE], case)
                elif wanted[i]:
                    assert_same(got[i], own[i], case)


def check_adversarial_input_on_one_rank() -> None:
    layer = layer_in(None, affine=False, activation="relu")
    x = batch(1)[MINE].requires_grad_()
    square(layer(x)).backward()
    assert_same(x.grad, reference(1, square, affine=False, activation="relu"))
    # Without parameters the others' backward pass does not run.
    with told("the ranks disagree", "'net.bn'", "requires_grad"):
        layer(batch(1)[MINE].requires_grad_(FIRST))


def networks() -> tuple[nn.Module, nn.Module]:
    """The same with the ranks together and alone."""

    def make(process_set: Any) -> nn.Module:
        torch.manual_seed(0)
        modules = nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5)
        return convert_sync_batchnorm(nn.ModuleDict({"net": nn.Sequential(*modules)}), process_set)["net"]

    return make(None), make(ALONE)


def check_stem_frozen_on_one_rank() -> None:
    ours, alone = networks()
    # The convolution alone: its norm still learns, and takes part.
    ours[0].requires_grad_(not FIRST)
    inputs: list[Tensor] = []
    for network, rows in ((ours, MINE), (alone, slice(None))):
        hidden = network[:3](batch(1)[rows])
        hidden.retain_grad()
        square(network[3:](hidden)).backward()
        assert hidden.grad is not None
        inputs.append(hidden.grad if rows == MINE else hidden.grad[MINE])
    assert_same(*inputs)
    assert (ours[0].weight.grad is None) == FIRST
    # All of it.
    ours[1].requires_grad_(not FIRST)
    with told("the ranks disagree", "'ModuleDict.net.1'", "requires_grad"):
        ours(batch(1)[MINE])


def check_no_grad_on_one_rank() -> None:
    layer = layer_in(None)
    before = layer.running_mean.clone()
    for off in (torch.no_grad, torch.inference_mode):
        with told("the ranks disagree", "'net.bn'", "no_grad"), off() if FIRST else contextlib.nullcontext():
            layer(batch(1)[MINE])
        with told("the ranks disagree", "'net.bn'", "no_grad"), off() if not FIRST else contextlib.nullcontext():
            layer(batch(1)[MINE])
    assert_same(layer.running_mean, before)
    with torch.no_grad():
        y = layer(batch(1)[MINE])
    assert_same(y, layer_in(ALONE)(batch(1))[MINE])


def check_checkpointing() -> None:
    """Reentrant, it runs without gradients first: on all ranks, or the error."""
    for reentrant in (True, False):
        layer, x = layer_in(None), batch(1)[MINE].requires_grad_()
        square(checkpoint(layer, x, use_reentrant=reentrant)).backward()
        assert_same(x.grad, reference(1, square))
    x = batch(1)[MINE].requires_grad_()
    with told("the ranks disagree", "'net.bn'", "no_grad"):
        checkpoint(layer, x, use_reentrant=True) if FIRST else layer(x)
    # Not reentrant, forward and backward are as without it.
    y = checkpoint(layer, x, use_reentrant=False) if FIRST else layer(x)
    assert_same(y, layer_in(ALONE)(batch(1))[MINE])


def check_gradients_of_some_tensors() -> None:
    layer, x = layer_in(None), batch(1)[MINE].requires_grad_()
    wanted = [layer.weight] if FIRST else [x, layer.weight]
    got = torch.autograd.grad(square(layer(x)), wanted)
    if not FIRST:
        assert_same(got[0], reference(1, square))


def check_backward_twice() -> None:
    layer, x = layer_in(None), batch(1)[MINE].requires_grad_()
    loss = square(layer(x))
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert_same(first, reference(1, square))
    assert_same(x.grad, first + first)


def check_another_order_of_calls() -> None:
    """Two calls of a layer, differentiated in one order on one rank and in another order on the others."""
    for wants_x in (True, False):
        layer = layer_in(None, activation="relu" if wants_x else None)
        losses = [square(layer(batch(seed)[MINE].requires_grad_(wants_x))) for seed in (1, 2)]
        with told("different calls of layer 'net.bn'", "same order"):
            losses[0 if FIRST else 1].backward()
        layer.zero_grad()
        # The other way round, as autograd has it by itself: one graph.
        xs = [batch(seed)[MINE].requires_grad_() for seed in (1, 2)]
        sum(square(layer(x)) for x in xs).backward()
        for seed, x in zip((1, 2), xs, strict=True):
            assert_same(x.grad, reference(seed, square, activation="relu" if wants_x else None))


def check_calls_told_apart_when_one_rank_is_empty() -> None:
    layer = layer_in(None)
    rows = slice(0) if FIRST else slice(None)
    inputs = [randn(seed, 6, 5, 4)[rows].requires_grad_() for seed in (1, 2)]
    losses = [square(layer(x)) for x in inputs]
    with told("different calls of layer 'net.bn'"):
        losses[0 if FIRST else 1].backward()


def check_join() -> None:
    """A rank that has joined is no participant: nothing to agree with."""
    layer = layer_in(None)
    for _ in range(1 if FIRST else 3):
        square(layer(batch(1)[MINE].requires_grad_())).backward()
    hvd.join()


def check_losses_with_gradients_in_them() -> None:
    """Gradient penalty, forces and curvature; with an empty share, too."""
    for kind in ("uneven", "empty"):
        for loss in second.LOSSES:
            mine = vectors.split(SIZE, kind)[RANK]
            second.check(
                loss, SyncBatchNorm, mine, vectors.SAMPLES, lambda tensor: hvd.allreduce(tensor, op=hvd.Sum, name="second")
            )


class Stem(nn.Module):
    def __init__(self, process_set: Any = None, **options: Any) -> None:
        super().__init__()
        self.layer = layer_in(process_set, **options)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.layer(x, residual).square()


def check_compiled() -> None:
    """The collective stays in the graph of a rank that does not need its result; and a graph knows its own need."""
    for backend in ("aot_eager", "inductor"):
        for compiles in (True, FIRST):
            torch.compiler.reset()
            model = Stem()
            network = torch.compile(model, fullgraph=True, backend=backend) if compiles else model
            for wants in (FIRST, not FIRST, True):
                x = batch(1)[MINE].requires_grad_(wants)
                network(x).sum().backward()
                assert (x.grad is not None) == wants
                if wants:
                    assert_same(x.grad, reference(1, square))
            with told("the ranks disagree", "'net.bn'", "no_grad"), torch.no_grad() if FIRST else contextlib.nullcontext():
                network(batch(1)[MINE])
            with torch.no_grad():
                network(batch(1)[MINE])
            # Only a residual's gradient, which needs no packet, on one rank.
            model = Stem(affine=False)
            network = torch.compile(model, fullgraph=True, backend=backend) if compiles else model
            x, residual = batch(1)[MINE].requires_grad_(not FIRST), batch(2)[MINE].requires_grad_(FIRST)
            network(x, residual).sum().backward()
            whole = [batch(1).requires_grad_(), batch(2).requires_grad_()]
            Stem(ALONE, affine=False)(*whole).sum().backward()
            assert_same(residual.grad if FIRST else x.grad, (whole[1] if FIRST else whole[0]).grad[MINE])
