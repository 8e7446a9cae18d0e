"""Collective names on two ranks: models with names of their own negotiate once, equal names are warned of."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.parallel import job

STEPS = 5


@pytest.fixture(scope="module", params=["torch", "tensorflow"])
def ran(request: pytest.FixtureRequest) -> tuple[str, job.Job, Counter[str]]:
    """The framework, the finished job, and how often each collective was negotiated."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timeline.json"
        finished = job.run(f"{request.param}_names", 2, 480, HOROVOD_TIMELINE=str(path))
        events = json.loads(path.read_text().rstrip().rstrip(",").rstrip("]") + "]")
    tensors = {event["pid"]: event["args"].get("name") for event in events if event.get("name") == "process_name"}
    # The coordinator notes that rank 1 has asked for it; what is in the cache is not asked for.
    negotiated = (tensors[event["pid"]] for event in events if event.get("ph") == "X" and event.get("name") == "1")
    return request.param, finished, Counter(re.sub(r"^.*hvd_syncbn\.", "", str(name)) for name in negotiated)


def test_checks(ran: tuple[str, job.Job, Counter[str]]) -> None:
    framework, finished, _ = ran
    for check in job.checks(f"{framework}_names"):
        finished.values(check)


def test_models_with_names_of_their_own_negotiate_once(ran: tuple[str, job.Job, Counter[str]]) -> None:
    framework, _, negotiated = ran
    layers = {
        "torch": ["Generator.main.1", "Discriminator.main.1", "ModuleDict.left.main.1", "ModuleDict.right.main.1"],
        "tensorflow": ["generator.batch_normalization", "discriminator.batch_normalization", "twice"],
    }[framework]
    for layer in layers:
        assert negotiated[f"{layer}.forward"] == 1, negotiated
    if framework == "tensorflow":
        assert negotiated["twice.forward_1"] == 1


def test_equal_names_negotiate_at_every_change_and_are_warned_of(ran: tuple[str, job.Job, Counter[str]]) -> None:
    framework, finished, negotiated = ran
    layer = {"torch": "Sequential.1", "tensorflow": "alike.batch_normalization"}[framework]
    assert negotiated[f"{layer}.forward"] == 2 * STEPS, negotiated
    warned = {"torch": ["check_models_of_one_class"]}.get(
        framework, ["check_models_of_one_name", "check_models_of_one_name_eagerly"]
    )
    for check in warned:
        for warnings in finished.values(check):
            assert len(warnings) == 1 and "share the collective name" in warnings[0], warnings
