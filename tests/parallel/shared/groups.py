"""What ``groups`` has to hold in either framework, on four ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest


def check_groups_of_a_job(hvd: Any, groups: Callable[..., Any]) -> None:
    for size, want in ((1, [[0], [1], [2], [3]]), (2, [[0, 1], [2, 3]]), (3, [[0, 1, 2, 3]]), (4, [[0, 1, 2, 3]])):
        mine, everyone = groups(size)
        assert [s.ranks for s in everyone] == want
        assert mine is next(s for s in everyone if hvd.rank() in s.ranks)
        numbers = hvd.allgather_object([s.process_set_id for s in everyone])
        assert numbers == numbers[:1] * 4
        again = groups(size)
        assert [s.process_set_id for s in again.all] == numbers[0]
    assert groups().mine is hvd.global_process_set  # one host
    assert groups(4).mine is hvd.global_process_set
    with pytest.warns(UserWarning, match="4 ranks, fewer than a group of 8"):
        assert groups(8).mine is hvd.global_process_set
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups(4)


def check_groups_are_agreed(hvd: Any, groups: Callable[..., Any]) -> None:
    """What one rank asks for wrongly is an error on all."""
    with pytest.raises(ValueError, match=r"one group size on all ranks\. Received: 2, 2, 2, 4 on ranks 0 to 3"):
        groups(4 if hvd.rank() == 3 else 2)
    for wrong in (0, -1, 2.0, True, "2"):
        with pytest.raises(ValueError, match="a group size of 1 or more, or None"):
            groups(wrong)
    with pytest.raises(ValueError, match="Received: 2, 0, 2, 2"):
        groups(0 if hvd.rank() == 1 else 2)
    assert groups(2).mine.included()
