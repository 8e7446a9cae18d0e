"""Faults of a job over torch.distributed: an error on every rank. Two ranks, and the last check kills one of them."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvd_syncbn.torch import SyncBatchNorm, convert_sync_batchnorm
from tests.torch_tools import error_of, randn

RANK = dist.get_rank()
ENDS_WITH_A_DEAD_RANK = True


def named(name: str, channels: int = 3, **options: Any) -> SyncBatchNorm:
    layer = SyncBatchNorm(channels, **options)
    layer.collective_name = name
    return layer


def assert_goes_on() -> None:
    """The group of ranks is still in use after an error that all of them got."""
    named("goes_on")(randn(RANK, 4, 3)).sum().backward()


def check_other_channels() -> None:
    channels = 3 + RANK
    error = error_of(lambda: named("channels", channels)(randn(0, 4, channels)))
    assert isinstance(error, ValueError) and "same number of channels" in str(error), error
    assert "on ranks [0]" in str(error) and "on ranks [1]" in str(error)
    assert_goes_on()


def check_a_rank_lacks_a_layer() -> None:
    """In the middle and at the end: where others run the layer, this rank runs the next one, or its backward pass."""
    x = randn(RANK, 4, 3).requires_grad_()
    for place in ("middle", "end"):
        names = ["first", "middle", "end"]
        if RANK == 1:
            names.remove(place)
        model = nn.Sequential(*(named(f"{place}.{name}") for name in names))
        error = error_of(lambda model=model: model(x).sum().backward())  # type: ignore[misc]
        assert isinstance(error, ValueError) and f"{place}.{place}.forward" in str(error), error
    assert_goes_on()


def check_a_rank_skips_a_layer_later() -> None:
    """After every name is known: packets of different layers have the same size, and differ in their digests."""
    x = randn(RANK, 4, 3).requires_grad_()
    for place in range(3):
        layers = [named(f"later.{place}.{i}") for i in range(3)]
        nn.Sequential(*layers)(x).sum().backward()
        if RANK == 1:
            del layers[place]
        model = nn.Sequential(*layers)
        error = error_of(lambda model=model: model(x).sum().backward())  # type: ignore[misc]
        assert isinstance(error, ValueError) and f"layer 'later.{place}." in str(error), error
    assert_goes_on()


def check_other_options() -> None:
    error = error_of(lambda: named("eps", eps=1e-5 * (1 + RANK))(randn(0, 4, 3)))
    assert isinstance(error, ValueError) and "disagree about layer 'eps'" in str(error), error
    dtype = (torch.float32, torch.float64)[RANK]
    error = error_of(lambda: named("dtype")(randn(0, 4, 3, dtype=dtype)))
    assert isinstance(error, ValueError) and "disagree about layer 'dtype'" in str(error), error
    with torch.set_grad_enabled(RANK == 0):
        error = error_of(lambda: named("gradient")(randn(0, 4, 3)))
    assert isinstance(error, ValueError) and "whether a gradient is needed" in str(error), error
    assert_goes_on()


def check_one_value_per_channel() -> None:
    error = error_of(lambda: named("one")(randn(0, 1 - RANK, 3)))
    assert isinstance(error, ValueError) and "more than 1 value per channel" in str(error), error
    assert_goes_on()


def check_a_forked_process() -> None:
    layer = named("forked")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # ends a child that waits
        try:
            os.write(write, str(error_of(lambda: layer(randn(0, 4, 3)))).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read) as file:
        assert "forked after" in file.read()
    assert_goes_on()


def check_a_rank_is_killed() -> None:
    """The last: the survivor gets an error that names the layer."""
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.Identity(), nn.BatchNorm1d(3)))
    armed = False

    def die(*_: Any) -> None:
        if armed and RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    model[1].register_forward_hook(die)
    x: Tensor = randn(RANK, 4, 3).requires_grad_()
    model(x).sum().backward()
    armed = True
    error = error_of(lambda: model(x))
    assert isinstance(error, RuntimeError) and "hvd_syncbn.Sequential.2.forward" in str(error), error
