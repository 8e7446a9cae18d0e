"""Changes to Horovod for ranks that have joined, and for processes that are forked from one."""

from __future__ import annotations

import pytest

from tests.parallel.job import run


@pytest.mark.parametrize("ranks", [2, 3])
class TestJoin:
    def test_sums(self, ranks: int) -> None:
        values = run("torch_join", ranks).values("check_sums_while_a_rank_has_joined")
        assert values == [[[float(ranks)] * 6] * 3] * ranks

    def test_barrier(self, ranks: int) -> None:
        run("torch_join", ranks).values("check_barrier_while_a_rank_has_joined")

    def test_allgather(self, ranks: int) -> None:
        said = run("torch_join", ranks).values("check_allgather_while_a_rank_has_joined")
        assert said[0] is None
        assert all("Allgather is not supported with Join" in text for text in said[1:])

    def test_autotuning(self, ranks: int) -> None:
        """It looked for the tensors of the others on a rank that had joined."""
        values = run("torch_join", ranks, HOROVOD_AUTOTUNE="1").values("check_sums_while_a_rank_has_joined")
        assert values == [[[float(ranks)] * 6] * 3] * ranks


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
class TestFork:
    def test_errors(self, framework: str) -> None:
        for rank, found in enumerate(run(f"{framework}_fork", 2).values("check_errors_in_a_fork")):
            assert (found["initialized"], found["rank"], found["size"]) == (True, rank, 2)
            errors = found["errors"]
            assert errors.pop("shutdown") == "nothing"
            for name, said in errors.items():
                assert "it was forked after hvd.init() from process" in said, (name, said)
                # Not one of those after which an elastic job starts anew.
                assert said.startswith("ValueError" if framework == "torch" or name == "init" else "InvalidArgumentError"), said

    def test_the_job_goes_on(self, framework: str) -> None:
        values = run(f"{framework}_fork", 2).values("check_the_job_goes_on_after_a_fork_ended")
        assert values == [[2.0, 2.0]] * 2
