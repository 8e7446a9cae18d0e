"""The checks of checks/tensorflow*.py, under horovodrun."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.parallel import job

pytest.importorskip("tensorflow")
pytest.importorskip("horovod")


def run(group: str, ranks: int, **environment: str) -> job.Job:
    return job.run(group, ranks, timeout=480, HOROVOD_DYNAMIC_PROCESS_SETS="1", **environment)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("check", [name for name in job.checks("tensorflow") if name != "check_one_digest"])
def test_op(check: str, ranks: int) -> None:
    run("tensorflow", ranks).values(check)


def test_one_digest() -> None:
    """1, 2 and 3 ranks, every split, eager and graph, both layouts."""
    digests = [d for ranks in (2, 3) for own in run("tensorflow", ranks).values("check_one_digest") for d in own]
    digests += run("tensorflow_digest", 1).values("check_one_digest")[0]
    assert len(digests) == (2 + 3 + 1) * 16
    assert len(set(digests)) == 1


@pytest.mark.parametrize("check", job.checks("tensorflow_keras"))
def test_keras(check: str) -> None:
    run("tensorflow_keras", 2).values(check)


@pytest.mark.parametrize("check", job.checks("tensorflow_groups"))
def test_groups(check: str) -> None:
    run("tensorflow_groups", 4).values(check)


def test_one_collective_per_layer_and_direction(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    timeline = run("tensorflow_timeline", 2, HOROVOD_TIMELINE=str(path))
    for check in job.checks("tensorflow_timeline"):
        timeline.values(check)
    events = json.loads(path.read_text().rstrip().rstrip(",").rstrip("]") + "]")
    tensors = {event["pid"]: event["args"].get("name") for event in events if event.get("name") == "process_name"}
    counts = Counter(tensors[event["pid"]] for event in events if event.get("name") == "ALLREDUCE")
    ours = {re.sub(r"^.*HorovodAllreduce/", "", name): n for name, n in counts.items()}
    layers = ["functional.left.batch_normalization", "functional.right.batch_normalization", "functional.shared", "eager.layer"]
    names = [f"hvd_syncbn.{layer}.{direction}" for layer in layers for direction in ("forward", "backward")]
    # TensorFlow numbers the second use of a name in a graph.
    names += ["hvd_syncbn.functional.shared.forward_1", "hvd_syncbn.functional.shared.backward_1"]
    assert ours == dict.fromkeys(names, 3)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_rank_dies(direction: str) -> None:
    """The survivor gets HorovodInternalError at once, from a graph the error that Keras's elastic mode restores from."""
    outcomes = run("tensorflow_death", 2, DYING_DIRECTION=direction)
    assert outcomes.ranks[1] == {}, outcomes.ranks
    outcome = outcomes.ranks[0].get("check_survivors", {})
    assert "value" in outcome, (outcome, outcomes.output)
    assert outcome["value"]["seconds"] < 10
    assert "(ended after" not in outcomes.output
