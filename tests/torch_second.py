"""Training steps that differentiate a gradient; the reference is the definition, in elementary operations, on a whole batch.

PyTorch's own batch norm is no reference for third derivatives: its second derivative takes the statistics for constants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Both sides compute in float64; a sum over the ranks rounds differently.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


class Definition(_BatchNorm):
    """Batch normalization by its definition."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        dims = [d for d in range(input.dim()) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(input.dim())]
        centered = input - input.mean(dims, keepdim=True)
        y = centered * (centered.square().mean(dims, keepdim=True) + self.eps).rsqrt()
        return y if self.weight is None else y * self.weight.reshape(shape) + self.bias.reshape(shape)


def network(norm: Callable[[int], nn.Module]) -> nn.Module:
    """Two norms, smooth activations."""
    torch.manual_seed(1)
    norms = norm(6), norm(5)
    for layer in norms:  # not by a counter, since other checks make layers on some ranks only
        layer.collective_name = f"second{layer.num_features}"
    layers = [nn.Linear(4, 6), norms[0], nn.Tanh(), nn.Linear(6, 5), norms[1], nn.Softplus(), nn.Linear(5, 1)]
    model = nn.Sequential(*layers).double()
    for p in model.parameters():
        nn.init.uniform_(p, 0.3, 1)
    return model


def gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    """The critic's loss of WGAN-GP: the gradient's norm at every sample should be 1."""
    score = model(x).sum()
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    return score + 10 * (gradient.norm(dim=1) - 1).square().sum()


def forces(model: nn.Module, x: Tensor) -> Tensor:
    """A learned potential: forces are the negative gradient of the energy, and are compared with given ones."""
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (-gradient - x.detach().sin()).square().sum()


def curvature(model: nn.Module, x: Tensor) -> Tensor:
    """A loss with second derivatives in it, whose gradient has third ones."""
    (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    return second.square().sum()


LOSSES = {loss.__name__: loss for loss in (gradient_penalty, forces, curvature)}


def gradients(loss: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of x and of the parameters."""
    x = x.detach().clone().requires_grad_()
    return list(torch.autograd.grad(loss(model, x), [x, *model.parameters()], allow_unused=True, materialize_grads=True))


def check(loss: str, norm: Callable[[int], nn.Module], mine: list[int], samples: int, add: Callable[[Tensor], Tensor]) -> None:
    """Compare this rank's part of a batch, whose loss is the sum over the ranks, with the whole batch.

    Args:
        loss: of ``LOSSES``.
        norm: makes a synchronized layer of some channels.
        mine: this rank's samples of all.
        samples: of the whole batch.
        add: sums a tensor over the ranks.
    """
    x = torch.randn(samples, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got = gradients(LOSSES[loss], network(norm), x[mine])
    want = gradients(LOSSES[loss], network(Definition), x)
    torch.testing.assert_close(got[0], want[0][mine], **TOLERANCE)
    for mine_alone, whole in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(add(mine_alone), whole, **TOLERANCE)
