"""Neither a layer's packets (patch 0019) nor a thread that waits (patches 0039 and 0041) wait for Horovod's cycle.

No timing, as a cycle is a second here.
"""

from __future__ import annotations

import pytest

from tests.parallel.job import run

CYCLE_SECONDS = 1


def slowest(framework: str, check: str) -> float:
    """The seconds that a check took on the slower of two ranks."""
    job = run(f"{framework}_cycle", 2, HOROVOD_CYCLE_TIME=str(1000 * CYCLE_SECONDS))
    return max(job.values(check))


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_layers_do_not_wait_for_the_cycle(framework: str) -> None:
    # 20 packets, each of which would wait for a cycle of its own.
    assert slowest(framework, "check_layers_do_not_wait_for_the_cycle") < 10 * CYCLE_SECONDS


def test_parallel_layers_do_not_wait_for_the_cycle() -> None:
    # Every second step waited for a cycle: a thread whose turn another one had was forgotten when that one was done.
    assert slowest("tensorflow", "check_parallel_layers_do_not_wait_for_the_cycle") < 10 * CYCLE_SECONDS


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_waiting_threads_do_not_wait_for_the_cycle(framework: str) -> None:
    # 30 collectives, each of which would wait for a cycle of its own.
    assert slowest(framework, "check_waiting_threads_do_not_wait_for_the_cycle") < 10 * CYCLE_SECONDS
