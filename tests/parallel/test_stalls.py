"""No silent wait: where ranks wait for each other, a warning names the layers of either side, then all ranks get an error."""

from __future__ import annotations

import re
import tempfile

import pytest

from tests.parallel.job import Job, run
from tests.parallel.shared.stalls import CASES

WARN, STOP = 1, 3
# A cached collective is looked at twice, then counted from the second look.
LIMIT = 3 * WARN + STOP + 10
# By case: which collectives each rank lacks.
LACKED = {
    "check_a_layer_that_others_lack": {0: "head", 1: "extra"},
    "check_another_order": {0: "right", 1: "left"},
    "check_a_rank_stops_early": {1: "trunk"},
}


@pytest.fixture(scope="module", params=["torch", "tensorflow"])
def job(request: pytest.FixtureRequest) -> Job:
    with tempfile.TemporaryDirectory() as folder:
        return run(
            f"{request.param}_stall", 2, 150, STALL_FOLDER=folder,
            HOROVOD_STALL_CHECK_TIME_SECONDS=str(WARN), HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=str(STOP),
        )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_are_told(job: Job, case: str) -> None:
    for outcome in job.values(case):
        assert STOP <= outcome["seconds"] < LIMIT, outcome
        assert "Horovod has been shut down" in outcome["error"]
    # "[0]<stderr>:1: [name, name]", "!" for a rank because of which Horovod gives up.
    lines = re.findall(r"^(?:\[\d\]<stderr>:)?(\d)(!?): \[(.*)\]$", job.output, re.MULTILINE)
    assert "A rank that has no input for a layer calls take_part(layer) of hvd_syncbn.torch or hvd_syncbn.keras" in job.output
    for given_up in ("", "!"):
        said = {int(rank): names for rank, mark, names in lines if case in names and mark == given_up}
        assert said.keys() == LACKED[case].keys(), job.output[-8000:]
        for rank, layer in LACKED[case].items():
            assert re.fullmatch(rf"\S*hvd_syncbn[._]{case}\.{layer}\S*forward\S*", said[rank]), said
