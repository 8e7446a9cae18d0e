"""The same job twice gives the same weights, whichever gradients came first; the settings that it takes over sockets."""

from __future__ import annotations

import pytest

from tests.parallel.job import run

FRAMEWORKS = ("torch", "tensorflow")


def weights(framework: str, ranks: int, over: str, **environment: str) -> set[str]:
    """The digests of the weights that steps of one job have left on all ranks."""
    everyone = run(f"{framework}_repeats", ranks, 200, REPEATS_OVER=over, **environment).values("check_repeats")
    assert everyone == [everyone[0]] * ranks
    return set(everyone[0])


@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_on_one_host(framework: str, ranks: int) -> None:
    """The default: sums through shared memory are taken in the order of ranks."""
    assert len(weights(framework, ranks, "memory")) == 1


@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_over_sockets_without_fusion(framework: str, ranks: int) -> None:
    assert len(weights(framework, ranks, "sockets", HOROVOD_FUSION_THRESHOLD="0")) == 1


def test_over_sockets_in_one_group() -> None:
    """Our optimizer for Keras always has one group of gradients. In PyTorch it is an argument of Horovod's."""
    assert len(weights("tensorflow", 3, "sockets")) == 1
    assert len(weights("torch", 3, "sockets", REPEATS_GROUPS="1")) == 1


def test_over_sockets_with_fusion() -> None:
    """What these settings are for: sums of the ring depend on where a gradient lies in the fused tensor."""
    assert len(weights("torch", 3, "sockets")) > 1
