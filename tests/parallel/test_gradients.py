"""What a rank needs of gradients is its own affair, where that can be right; elsewhere every rank is told."""

from __future__ import annotations

import re
import tempfile

import pytest

from tests.parallel.job import checks, run

WARN, STOP = 1, 3


@pytest.mark.parametrize("check", checks("torch_gradients"))
@pytest.mark.parametrize("ranks", [2, 3])
def test_torch(ranks: int, check: str) -> None:
    run("torch_gradients", ranks, HOROVOD_DYNAMIC_PROCESS_SETS="1").values(check)


@pytest.mark.parametrize("check", checks("tensorflow_gradients"))
@pytest.mark.parametrize("ranks", [2, 3])
def test_tensorflow(ranks: int, check: str) -> None:
    run("tensorflow_gradients", ranks, HOROVOD_DYNAMIC_PROCESS_SETS="1").values(check)


def test_a_tape_that_stops() -> None:
    """TensorFlow does not tell beforehand; the warning names the layer and the rank, then every rank has an error."""
    with tempfile.TemporaryDirectory() as folder:
        job = run(
            "tensorflow_tape", 2, 150, STALL_FOLDER=folder,
            HOROVOD_STALL_CHECK_TIME_SECONDS=str(WARN), HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=str(STOP),
        )  # fmt: skip
    for outcome in job.values("check_a_tape_that_stops"):
        assert STOP <= outcome["seconds"] < 3 * WARN + STOP + 20, outcome
        assert "Horovod has been shut down" in outcome["error"]
    # As test_stalls.py: the rank that is lacking, and which layers.
    lines = re.findall(r"^(?:\[\d\]<stderr>:)?(\d)(!?): \[(.*)\]$", job.output, re.MULTILINE)
    assert {(rank, mark) for rank, mark, names in lines if re.search(r"stopped\S*backward", names)} == {("0", ""), ("0", "!")}
