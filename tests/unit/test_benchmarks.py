"""The benchmarks' numbers: timing, quartiles, accuracy, the cost model. That they run: tests/parallel/test_benchmarks.py."""

import json
import math

import numpy as np
import pytest
from scipy.optimize import nnls

from benchmarks import accuracy, goals, layer, soak
from benchmarks import cost_model as document
from benchmarks import measure as m
from hvd_syncbn import native
from hvd_syncbn.cli import cost_model, networks


class TestMeasure:
    def test_spread(self) -> None:
        assert m.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
        assert m.spread([7.0]) == (7.0, 7.0, 7.0)

    def test_ratios_are_of_the_same_rounds(self) -> None:
        # A machine that is ten times slower in one round.
        assert m.ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == (2.0, 2.0, 2.0)

    def test_slowest_rank_of_each_round(self) -> None:
        ranks = [{"ours": [[1.0, 5.0], [9.0, 1.0]], "failed here": [[1.0]]}, {"ours": [[2.0, 4.0], [3.0, 2.0]]}]
        assert m.slowest(ranks) == {"ours": [[2.0, 5.0], [9.0, 2.0]]}

    def test_contestants_take_turns_and_failures_are_results(self) -> None:
        calls = []

        def make(name: str) -> m.Step:
            def step() -> tuple[float, ...]:
                calls.append(name)
                return (1.0, 2.0)

            return step

        def broken() -> m.Step:
            raise ValueError("no such\nlayer")

        steps, errors = m.attempt({"a": lambda: make("a"), "b": lambda: make("b"), "c": broken})
        assert errors == {"c": "ValueError: no such"}
        calls.clear()
        assert m.rounds(steps, errors, 2) == {"a": [[1.0, 2.0]] * 2, "b": [[1.0, 2.0]] * 2}
        assert calls == ["a", "b", "a", "b"]
        assert m.rounds({"late": broken}, errors, 2) == {}
        assert errors.keys() == {"c", "late"}

    @pytest.mark.parametrize(
        ("value", "text"), [(0.0, "0.0"), (1234.5, "1234"), (1.234, "1.23"), (0.0123, "0.0123"), (1e-6, "1.0e-06")]
    )
    def test_number(self, value: float, text: str) -> None:
        assert m.number(value) == text


class TestGoals:
    def test_verdicts(self) -> None:
        at_least = goals.Goal("fast", 3.0, True, [goals.Found("here", 2.9), goals.Found("there", 3.0)])
        assert [at_least.met(found.value) for found in at_least.found] == [False, True]
        at_most = goals.Goal("cheap", 1.15, False, [])
        assert at_most.met(1.15)
        assert not at_most.met(1.2)
        assert not at_most.met(math.nan)
        assert goals.table([at_least]).row_count == 1


class TestExactSumsShare:
    def test_is_the_time_above_no_pieces(self) -> None:
        # 4 s of additions, 1 s per large piece: 2 of them, 4 halves, and 6 pieces of its own; then 10 s of applying.
        times = {"moments": [[10.0]], "large pieces": [[6.0]], "half pieces": [[8.0]], "apply": [[10.0]]}
        assert layer.exact_sums_share(times).middle == 6.0 / 20.0


class TestAccuracy:
    def test_exact_has_mean_zero_and_variance_one(self) -> None:
        one = np.ones(accuracy.SHAPE[1], np.float32)
        y = accuracy.exact(accuracy.batch(1e4), one, 0 * one)
        assert np.abs(y.mean((0, 2, 3))).max() < 1e-12
        assert np.abs(y.var((0, 2, 3)) - 1).max() < 1e-4  # eps, and 1e4 in float32

    def test_ulps_are_of_one_where_y_is_small(self) -> None:
        assert accuracy.ulps(np.array([2.0**-23]), np.array([0.001])) == 1.0
        assert accuracy.ulps(np.array([2.0**-23]), np.array([2.5])) == 0.5

    @pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
    def test_ours_is_within_its_promise(self, mean: float) -> None:
        x = accuracy.batch(mean)
        shape = native.shape(x.shape[0], x.shape[1], math.prod(x.shape[2:]), "float32")
        gamma, beta = accuracy.affine()
        y, _ = native.forward(shape, x, native.forward_packet(shape, x, m.EPS), m.EPS, gamma, beta)
        expected = accuracy.exact(x, gamma, beta)
        assert accuracy.ulps(np.abs(y.reshape(x.shape) - expected), expected) <= (1.0 if mean <= 1e2 else 1.2)


class TestCostModel:
    @pytest.mark.parametrize(
        ("network", "layers", "channels"),
        # Half of a network's batch norm parameters, as the model zoos count them.
        [("ResNet-50", 53, 26560), ("EfficientNet-B0", 49, 21008), ("EfficientNet-B4", 96, 62600)],
    )
    def test_networks(self, network: str, layers: int, channels: int) -> None:
        found = networks.NETWORKS[network]
        assert (len(found), sum(found)) == (layers, channels)

    def test_packet(self) -> None:
        assert cost_model.packet_bytes(64) == 8 * (4 + 17 * 64)

    def test_ring(self) -> None:
        link = cost_model.Link(wait=1.0, alpha=0.5, beta=0.25)
        assert cost_model.ring(1, 8, link) == 0
        assert cost_model.ring(2, 8, link) == 1 + 2 * (0.5 + 4 * 0.25)
        assert cost_model.ring(4, 8, link) == 1 + 6 * (0.5 + 2 * 0.25)

    def test_hierarchical_is_a_ring_within_one_node(self) -> None:
        inside, across = document.INSIDE, document.ACROSS
        assert cost_model.hierarchical(8, 1e6, inside, across) == cost_model.ring(8, 1e6, inside)
        assert cost_model.hierarchical(1024, 1e4, inside, across) < cost_model.ring(1024, 1e4, document.ETHERNET)

    def test_fit_finds_the_link(self) -> None:
        link = cost_model.Link(3e-4, 2e-5, 1e-9)
        points = [(p, size, cost_model.ring(p, size, link)) for p in (2, 3, 4) for size in (1e3, 1e5, 1e7)]
        assert cost_model.fit(points) == pytest.approx(link, rel=1e-6)
        assert document.check_table(points, link).row_count == len(points)

    def test_fit_is_the_non_negative_least_squares(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(20):
            points = [(p, size, float(rng.uniform(1e-4, 1e-2))) for p in (2, 3, 4) for size in (1e4, 3e5, 2e6)]
            link = cost_model.fit(points)
            terms = np.array([[1, 2 * (p - 1), 2 * (p - 1) / p * size] for p, size, _ in points])
            terms /= np.array([seconds for *_, seconds in points])[:, None]
            scale = 1 / np.linalg.norm(terms, axis=0)
            want, _ = nnls(terms * scale, np.ones(len(points)))
            # Two solvers of one problem; its condition, some 10, times rounding.
            assert np.array(link) / scale == pytest.approx(want, rel=1e-9, abs=1e-9)

    def test_one_number_of_ranks_leaves_messages_in_the_wait(self) -> None:
        link = cost_model.Link(3e-4, 2e-5, 1e-9)
        found = cost_model.fit([(4, size, cost_model.ring(4, size, link)) for size in (1e3, 1e5, 1e7)])
        assert found == pytest.approx((3e-4 + 6 * 2e-5, 0, 1e-9), rel=1e-6)

    def test_a_step_has_two_packets_per_layer(self) -> None:
        assert cost_model.step([64, 128], lambda size: size) == 2 * 8 * (4 + 17 * 64 + 4 + 17 * 128)


def test_cases_are_json() -> None:
    from benchmarks.__main__ import plan

    for quick in (True, False):
        jobs = plan(quick)
        assert len({job.title for job in jobs}) == len(jobs)
        json.dumps([job.cases for job in jobs])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_soak_deals_out_whole_batches(ranks: int) -> None:
    """In consecutive parts, to all ranks or to the last two; in all three kinds of steps some rank gets nothing."""
    empty = set()
    for number in range(200):
        step = soak.draw(number, ranks)
        assert list(step.parts) == (soak.pair(ranks) if step.among == "pair" else list(range(ranks)))
        samples = [sample for part in step.parts.values() for sample in range(part.start, part.stop)]
        assert samples == list(range(len(step.x)))
        empty |= {step.among for part in step.parts.values() if part.start == part.stop}
    assert empty == {"shared", "pair", "own"}
