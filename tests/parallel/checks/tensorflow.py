"""``sync_batch_norm`` in TensorFlow on several ranks. The reference is one process: the same op on the global batch, alone in a
process set of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_syncbn import vectors
from hvd_syncbn.cli.stacks import tensorflow_stack
from hvd_syncbn.tensorflow import sync_batch_norm
from tests.arrays import hostile
from tests.tensorflow_tools import LAYOUTS, Step, assert_same_bits, in_graph, step, train

BOTH = {"eager": lambda function: function, "graph": in_graph}


@cache
def singles() -> list[Any]:
    """Process sets of one rank each. Adding them is collective."""
    return [hvd.add_process_set([rank]) for rank in range(hvd.size())]


def alone(data: Step, **options: Any) -> Any:
    """What one rank makes of the data."""
    return train(data, process_set=singles()[hvd.rank()], **options)


def together(how: str, data: Step, **options: Any) -> Any:
    """What the ranks make of it, eager or in a graph."""
    return BOTH[how](lambda: train(data, **options))()


def samples(seeds: Sequence[int], *shape: int) -> Step:
    """The batches of several ranks in one."""
    parts = [step(shape, seed=seed) for seed in seeds]
    return Step(*(np.concatenate([part[i] for part in parts]) for i in range(2)), *step(shape).state)


def ranges(counts: list[int]) -> list[slice]:
    edges = np.cumsum([0, *counts]).tolist()
    return [slice(begin, end) for begin, end in pairwise(edges)]


def check_one_digest() -> list[str]:
    """All ways of dealing out the stack's batch; the test compares across rank counts, too."""
    digests = []
    for split in vectors.SPLITS:
        parts = vectors.split(hvd.size(), split)
        for layout in LAYOUTS:
            for graph in (False, True):
                y, dx, running = tensorflow_stack(parts[hvd.rank()], layout, graph)
                everyone = hvd.allgather_object((parts[hvd.rank()], y, dx))
                whole = [np.empty_like(vectors.inputs()[0]) for _ in range(2)]
                for samples, *tensors in everyone:
                    for array, tensor in zip(whole, tensors, strict=True):
                        array[samples] = tensor
                digests.append(vectors.digest(*whole, running))
    return digests


def check_parts_equal_the_whole() -> None:
    """Dtypes, masks, hostile values, other spatial sizes of ranks without samples."""
    counts = [3] + [5] * (hvd.size() - 1)
    mine = ranges(counts)[hvd.rank()]
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        rng = np.random.default_rng(0)
        data = step((sum(counts), 6, 33, 5), dtype=dtype, parameters="float64" if dtype == "float64" else "float32")
        x = hostile(rng, data.x.shape, dtype).astype(data.x.dtype)
        mask = rng.random(x.shape[:-1]) < 0.5
        for variant in (data, data._replace(x=x), data._replace(mask=mask), data._replace(x=x, mask=mask)):
            for how in BOTH:
                options: dict[str, Any] = {"activation": "relu", "name": f"{dtype}.{how}"}
                got = together(how, variant.part(mine), **options)
                whole = alone(variant, **options)
                expected = [t if i in (1, 2, 4, 5) else t[mine] for i, t in enumerate(whole)]
                # The gradients of gamma and beta are each rank's own part.
                assert_same_bits([got[i] for i in (0, 1, 2, 3, 6)], [expected[i] for i in (0, 1, 2, 3, 6)])
                if np.isfinite(variant.x).all() and dtype == "float64":
                    for i in (4, 5):
                        total = hvd.allreduce(got[i], op=hvd.Sum, name=f"total{i}")
                        np.testing.assert_allclose(total, whole[i], rtol=1e-12, atol=1e-12)


def check_other_spatial_sizes() -> None:
    data = [step((2, 4 + rank, 3), seed=rank) for rank in range(hvd.size())]
    flat = Step(*(np.concatenate([np.reshape(d[i], (-1, 3)) for d in data]) for i in range(2)), *data[0].state)
    mine = data[hvd.rank()]
    got = train(Step(mine.x, mine.dy, *data[0].state), name="spatial")
    expected = alone(flat)
    part = ranges([2 * (4 + rank) for rank in range(hvd.size())])[hvd.rank()]
    assert_same_bits(
        [np.reshape(got[0], (-1, 3)), *got[1:3], np.reshape(got[3], (-1, 3))],
        [expected[0][part], *expected[1:3], expected[3][part]],
    )


def check_far_mean_and_uneven_batches() -> None:
    """4 samples on the first rank, 8 on the others, mean/std = 1e4."""
    counts = [4] + [8] * (hvd.size() - 1)
    mine = ranges(counts)[hvd.rank()]
    x = (np.random.default_rng(0).standard_normal((sum(counts), 6, 5, 3)) + 1e4).astype(np.float32)
    one, zero = np.ones(3, np.float32), np.zeros(3, np.float32)
    y = sync_batch_norm(x[mine], one, zero, zero, one, training=True, epsilon=0.0, name="far")[0]
    wide = x.astype(np.float64)
    expected = (wide - wide.mean((0, 1, 2))) / wide.std((0, 1, 2))
    np.testing.assert_allclose(y, expected[mine], atol=2e-6)


def check_nonfinite() -> None:
    """What one rank has is NaN in that channel everywhere, and leaves no trace in the others."""
    for value in (np.nan, np.inf):
        data = step((4, 5, 3))._replace(residual=None)
        clean = train(data, name="clean")
        if hvd.rank() == 0:
            data.x[1, 1, 2] = value
        y, mean, variance, dx, *_ = train(data, name="nonfinite")
        for i, got in ((0, y), (1, mean), (2, variance), (3, dx)):
            kept = {1: data.mean, 2: data.variance}.get(i)
            assert np.isnan(np.asarray(got)[..., 2]).all() if kept is None else got[2] == kept[2]
            assert_same_bits([np.asarray(got)[..., :2]], [np.asarray(clean[i])[..., :2]])
        moving = sync_batch_norm(data.x, *data.state, training=True, skip_nonfinite=False, name="as_keras")[1:]
        for got, i in zip(moving, (1, 2), strict=True):
            assert np.isnan(got[2]) and not np.isnan(got[:2]).any()
            assert_same_bits([got[:2]], [clean[i][:2]])


def check_all_empty() -> None:
    data = step((0, 4, 3))
    for how in BOTH:
        got = together(how, data, name=f"empty.{how}")
        assert_same_bits(got[:3], [data.x, data.mean, data.variance])


def check_batch_known_to_be_empty() -> None:
    """TensorFlow folds, merges and prunes by what it knows when it optimizes a graph; the other ranks would wait."""
    data = step((4, 3))._replace(residual=None)

    def norm(x: Any, name: str) -> Any:
        return sync_batch_norm(x, *data.state, training=True, name=name)[0]

    @in_graph
    def run(x: Any, dy: Any) -> Any:
        if hvd.rank() > 0:
            x, dy = tf.zeros((0, 3)), tf.zeros((0, 3))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = norm(2 * norm(x, "known0"), "known1") + norm(x, "known2") * norm(x, "known3")
        return y, tape.gradient(y, x, output_gradients=dy)

    for _ in range(3):
        y, dx = run(tf.constant(data.x), tf.constant(data.dy))
        assert len(y) == len(dx) == (0 if hvd.rank() else 4)


def check_process_sets() -> None:
    """The first rank and all the others, at the same time and under the same names."""
    groups = [[0], list(range(1, hvd.size()))]
    sets = [singles()[0], singles()[1] if hvd.size() == 2 else hvd.add_process_set(groups[1])]
    group = int(hvd.rank() > 0)
    mine = samples([hvd.rank()], 4, 5, 3)
    expected = alone(samples(groups[group], 4, 5, 3))
    part = ranges([4] * len(groups[group]))[groups[group].index(hvd.rank())]
    for how in BOTH:
        got = together(how, mine, process_set=sets[group], name=f"sets.{how}")
        assert_same_bits(got[:4], [expected[0][part], *expected[1:3], expected[3][part]])
    try:
        train(mine, process_set=sets[1 - group])
    except ValueError as error:
        assert "not in" in str(error), error
    else:
        raise AssertionError("a process set without this rank was accepted")


def _fails(act: Callable[[], Any], *words: str) -> None:
    for wrap, expected in ((BOTH["eager"], ValueError), (in_graph, tf.errors.OpError)):
        try:
            wrap(act)()
        except expected as error:
            assert all(word in str(error) for word in words), error
        else:
            raise AssertionError(f"no {expected}")


def check_ranks_that_disagree() -> None:
    """An error on every rank that names the layer; and the job can go on."""
    first = hvd.rank() == 0
    odd = step((4, 3 if first else 2))
    _fails(lambda: train(odd, name="block.odd"), "block.odd", "Mismatched")
    even = step((4, 3))
    _fails(lambda: train(even, name="block.eps", epsilon=1e-3 if first else 1e-5), "block.eps", "disagree", "epsilon=")
    typed = step((4, 3), dtype="float32" if first else "bfloat16")
    _fails(lambda: train(typed, name="block.typed"), "block.typed", "disagree", "dtype=")
    assert np.isfinite(train(even, name="block.good")[0]).all()


def check_one_value() -> None:
    one = step((int(hvd.rank() == 0), 3))
    _fails(lambda: train(one, name="one"), "Expected more than 1 value per channel", "'one'")
    # One each is a batch of several.
    each = step((1, 3), seed=hvd.rank())._replace(residual=None)
    y = train(each, name="each")[0]
    assert np.isfinite(y).all()


def check_join() -> None:
    """A rank that has no more batches takes part with nothing."""
    mine = samples([hvd.rank()], 4, 5, 3)
    results = [train(mine, name="joined") for _ in range(1 if hvd.rank() == 0 else 3)]
    hvd.join()
    others = list(range(1, hvd.size()))
    if hvd.rank() in others:
        expected = alone(samples(others, 4, 5, 3))
        part = ranges([4] * len(others))[others.index(hvd.rank())]
        for got in results[1:]:
            assert_same_bits(got[:4], [expected[0][part], *expected[1:3], expected[3][part]])


def check_branches_of_a_graph() -> None:
    """Independent layers in one graph, whose collectives may start in any order on any rank; one of them twice."""
    data = step((4, 6, 5, 3), seed=hvd.rank())

    @in_graph
    def run(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            order = range(12) if hvd.rank() % 2 else reversed(range(12))
            outputs = {i: sync_batch_norm(x * (i + 1), *data.state, training=True, name=f"branch{i}")[0] for i in order}
            twice = [sync_batch_norm(x * i, *data.state, training=True, name="shared")[0] for i in (1, 2)]
            total = tf.add_n([outputs[i] for i in range(12)] + twice)
        return total, tape.gradient(total, x, output_gradients=tf.constant(data.dy))

    x = tf.constant(data.x)
    first = run(x)
    for _ in range(20):
        assert_same_bits(run(x), first)


def check_loop() -> None:
    data = step((4, 3), seed=hvd.rank())

    @in_graph
    def run(x: Any) -> Any:
        def body(i: Any, x: Any) -> Any:
            return i + 1, sync_batch_norm(x, *data.state, training=True, name="loop")[0]

        return tf.while_loop(lambda i, _: i < 5, body, (0, x), parallel_iterations=1)[1]

    x = data.x
    for _ in range(5):
        x = sync_batch_norm(x, *data.state, training=True, name="unrolled")[0]
    assert_same_bits([run(tf.constant(data.x))], [x])
