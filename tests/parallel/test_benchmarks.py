"""The benchmarks run from end to end, on two ranks and next to nothing. No time is looked at."""

from pathlib import Path

from benchmarks import jobs, latency, plots
from benchmarks.__main__ import collect, tables
from benchmarks.goals import goals
from benchmarks.jobs import Job

SECTIONS = (
    "layer",
    "kernels",
    "exact sums",
    "overhead",
    "memory",
    "synchronized",
    "network",
    "packets",
    "training",
    "accuracy",
)


def run(job: Job) -> jobs.Outcome:
    done: list[int] = []
    outcome = jobs.run(job, done.append)
    assert outcome.error is None
    assert sum(done) == len(outcome.records) == len(job.cases)
    return outcome


def test_from_job_to_pictures(tmp_path: Path) -> None:
    shape = (8, 16, 8, 8)
    alone = [
        {"kind": "layer", "shape": shape, "layout": "channels last", "dtype": "bfloat16", "rounds": 2},
        {"kind": "layer", "shape": (64, 256), "layout": "channels last", "dtype": "float32", "rounds": 2},
        {"kind": "kernels", "shape": shape, "layout": "channels first", "rounds": 2},
        {"kind": "exact sums", "shape": (32, 16, 16, 16), "rounds": 2},
        {"kind": "overhead", "rounds": 2},
        {"kind": "memory"},
    ]
    together = [
        {"kind": "synchronized", "shape": shape, "rounds": 2},
        {"kind": "packets", "channels": (8, 64), "rounds": 2},
        *latency.cases(2, latency.PACKET, latency.MEMORY, latency.SOCKET, latency.ROUND_TRIP),
        {"kind": "accuracy", "mean": 1e4},
    ]
    outcomes = [run(Job("1", "torch", alone, limit=60)), run(Job("2", "torch", together, 2, limit=60))]
    results = collect(outcomes)
    assert not [name for name, rows in results.items() if not rows and name not in ("network", "ddp", "training")]
    assert all(list(tables(results)))
    found = {goal.text: goal for goal in goals(results)}
    for text in ("bytes equal to those of one process (1: yes)", "ulps from exact, 4 + 8 samples, mean up to 1e4 std"):
        assert found[text].found
        assert all(found[text].met(value) for _, value in found[text].found)
    # Horovod's own layer in PyTorch is for GPUs: a result, not an end.
    assert "expected input tensor to be on GPU" in results["synchronized"][0]["errors"]["horovod"]
    assert [row["channels"] for row in results["latency"]] == list(latency.CHANNELS)
    for row in results["latency"]:
        assert row["ms"].keys() == {latency.PACKET, latency.MEMORY, latency.SOCKET, latency.ROUND_TRIP}
    assert found["2 ranks: ms per packet of 8 channels"].found
    assert {path.name for path in plots.draw(results, tmp_path)} == {"layer.png", "synchronized.png", "accuracy.png"}


def test_packets_of_process_sets() -> None:
    outcome = run(Job("1", "torch", latency.cases(2, latency.PACKET, latency.SET), 4, limit=120, sets=True))
    rows = latency.rows([outcome])
    assert all(row["ms"].keys() == {latency.PACKET, latency.SET} for row in rows)
    text = "4 ranks: packet of one of 4 process sets, x that of all ranks"
    assert len({goal.text: goal for goal in goals({name: [] for name in SECTIONS} | {"latency": rows})}[text].found) == 3


def test_a_job_that_fails_says_why() -> None:
    outcome = jobs.run(Job("1", "torch", [{"kind": "accuracy"}], limit=60), lambda _: None)
    assert outcome.records == []
    assert outcome.error is not None
    assert "missing 1 required positional argument: 'mean'" in outcome.error


def test_a_job_that_hangs_is_ended() -> None:
    outcome = jobs.run(Job("1", "torch", [{"kind": "memory"}], limit=0), lambda _: None)
    assert outcome.error == "ended after 0 s"
    assert not outcome.records
