"""``sync_batch_norm`` in TensorFlow, on one rank."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

tf = pytest.importorskip("tensorflow")
pytest.importorskip("horovod")

import horovod.tensorflow as hvd  # noqa: E402

from hvd_syncbn import native  # noqa: E402
from hvd_syncbn.tensorflow import sync_batch_norm  # noqa: E402
from hvd_syncbn.tf_impl import ops  # noqa: E402
from hvd_syncbn.tf_impl.functional import frozen_batch_norm  # noqa: E402
from tests import tensorflow_second as second  # noqa: E402
from tests.arrays import NUMPY, hostile, rounded, same_bits, storage  # noqa: E402
from tests.tensorflow_tools import AXIS, Step, assert_same_bits, in_graph, step, train  # noqa: E402

DTYPES = tuple(NUMPY)
EPSILON, MOMENTUM = 1e-3, 0.9
WEIGHTS = (MOMENTUM, 1.0 - MOMENTUM)


@pytest.fixture(autouse=True, scope="module")
def _horovod() -> None:
    hvd.init()


# ---- Bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("layout", "options"),
    [*product(native.LAYOUTS, ["plain", "relu", "unbiased"]), ("channels_last", "mask")],
)
def test_a_step_is_the_cores(dtype: str, layout: str, options: str) -> None:
    """Hostile values, denormals among them: TensorFlow's threads flush those to zero, the core must not."""
    n, c, height, width = 3, 21, 5, 7
    rng = np.random.default_rng(DTYPES.index(dtype))
    x, dy, residual = (hostile(rng, (n, c, height * width), dtype, nonfinite=i == 0) for i in range(3))
    dy[:, 0] = float(np.finfo(np.float32).smallest_subnormal) if dtype == "float32" else dy[:, 0]
    parameters = "float64" if dtype == "float64" else "float32"
    gamma, beta, mean, variance = (rounded(rng.standard_normal(c), parameters).astype(parameters) for _ in range(4))
    mask = rng.random((n, height, width)) < 0.5 if options == "mask" else None

    shape = native.shape(n, c, height * width, dtype, layout)
    xs, dys, residuals = (storage(values, dtype, layout) for values in (x, dy, residual))
    masks = None if mask is None else mask.astype(np.uint8)
    relu = options == "relu"
    packet = native.forward_packet(shape, xs, EPSILON, masks)
    new_mean, new_variance = mean.copy(), variance.copy()
    y, stats = native.forward(
        shape, xs, packet, EPSILON, gamma, beta, new_mean, new_variance, WEIGHTS, options == "unbiased", residuals, relu
    )
    ys = y if relu else None
    packet = native.backward_packet(shape, xs, dys, stats, ys, None if mask is None else int(mask.sum()))
    dgamma, dbeta = native.parameter_gradients(shape, packet, stats, parameters)
    dx, dresidual = native.backward(shape, xs, dys, packet, stats, gamma, ys, masks)

    sizes = (n, c, height, width) if layout == "channels_first" else (n, height, width, c)

    def tensor(array: NDArray[Any]) -> NDArray[Any]:
        return array.view(NUMPY[dtype]).reshape(sizes)

    data = Step(tensor(xs), tensor(dys), gamma, beta, mean, variance, tensor(residuals), mask)
    got = train(
        data,
        axis=AXIS[layout],
        epsilon=EPSILON,
        momentum=MOMENTUM,
        activation="relu" if relu else None,
        unbiased_variance=options == "unbiased",
    )
    assert_same_bits(got, [tensor(y), new_mean, new_variance, tensor(dx), dgamma, dbeta, tensor(dresidual)])


@pytest.mark.parametrize("shape", [(4, 3), (64, 8, 8, 33), (2, 5000, 3)], ids=str)
def test_eager_and_graph_and_unknown_dims_are_equal(shape: tuple[int, ...]) -> None:
    data = step(shape)
    eager = train(data, activation="relu")
    assert_same_bits(in_graph(lambda: train(data, activation="relu"))(), eager)

    @tf.function(input_signature=[tf.TensorSpec([None] * (len(shape) - 1) + [shape[-1]])] * 3)
    def unknown(x: Any, dy: Any, residual: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, residual])
            y, mean, variance = sync_batch_norm(x, *data.state, training=True, residual=residual, activation="relu")
        assert y.shape.as_list() == [None] * (len(shape) - 1) + [shape[-1]]
        assert mean.shape.as_list() == variance.shape.as_list() == [shape[-1]]
        return y, mean, variance, *tape.gradient(y, [x, residual], output_gradients=dy)

    expected = [*eager[:4], eager[6]]
    assert_same_bits(unknown(data.x, data.dy, data.residual), expected)
    fewer = data._replace(x=data.x[:2], dy=data.dy[:2], residual=data.residual[:2])
    got = train(fewer, activation="relu")
    assert_same_bits(unknown(fewer.x, fewer.dy, fewer.residual), [*got[:4], got[6]])


def test_channels_may_be_unknown() -> None:
    data = step((6, 4, 3))
    vector = tf.TensorSpec([None])

    @tf.function(input_signature=[tf.TensorSpec([None, None, None]), vector, vector, vector, vector])
    def run(x: Any, *state: Any) -> Any:
        return sync_batch_norm(x, *state, training=True)

    assert_same_bits(run(data.x, *data.state), train(data._replace(residual=None))[:3])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"moving_mean of shape \[3\]"):
        run(data.x, *(np.ones(4, np.float32) for _ in range(4)))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -4, -2])
def test_any_axis_is_the_last_one_transposed(axis: int) -> None:
    data = step((4, 3, 5, 6), axis)
    last = Step(*(np.moveaxis(t, axis, -1) if np.ndim(t) == 4 else t for t in data))
    got, expected = train(data, axis=axis), train(last)
    for i in (0, 3, 6):
        expected[i] = np.moveaxis(expected[i].numpy(), -1, axis)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", DTYPES)
def test_parameters_have_a_dtype_of_their_own(dtype: str, parameters: str) -> None:
    data = step((16, 3), dtype=dtype, parameters=parameters)
    y, mean, variance, dx, dgamma, dbeta, dresidual = train(data)
    assert {t.dtype.name for t in (y, dx, dresidual)} == {dtype}
    assert {t.dtype.name for t in (mean, variance, dgamma, dbeta)} == {parameters}
    wide = [np.asarray(t, np.float64) for t in train(Step(*(None if t is None else t.astype(np.float64) for t in data)))]
    tolerance = {"float16": 0.02, "bfloat16": 0.1}.get(dtype, {"float16": 0.02, "bfloat16": 0.1}.get(parameters, 1e-5))
    np.testing.assert_allclose(np.asarray(y, np.float64), wide[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.asarray(mean, np.float64), wide[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("missing", [("gamma",), ("beta",), ("gamma", "beta")], ids="+".join)
def test_gamma_and_beta_may_be_missing(missing: tuple[str, ...]) -> None:
    data = step((5, 4, 3))
    neutral = data._replace(**{name: np.full(3, float(name == "gamma"), np.float32) for name in missing})
    expected = train(neutral)
    kept = [i for i in range(7) if not ((i == 4 and "gamma" in missing) or (i == 5 and "beta" in missing))]
    assert_same_bits(train(data._replace(**dict.fromkeys(missing))), [expected[i] for i in kept])


# ---- Values


def plain(data: Step, axes: list[int], relu: bool = False) -> list[Any]:
    """The same in TensorFlow's own float64 ops."""
    values = [tf.constant(t, tf.float64) for t in (data.x, data.gamma, data.beta, data.residual)]
    x, gamma, beta, residual = values
    with tf.GradientTape() as tape:
        tape.watch(values)
        mean, variance = tf.nn.moments(x, axes)
        y = tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON) + residual
        y = tf.nn.relu(y) if relu else y
    moving = [MOMENTUM * old + (1 - MOMENTUM) * new for old, new in ((data.mean, mean), (data.variance, variance))]
    return [y, *moving, *tape.gradient(y, values, output_gradients=tf.constant(data.dy, tf.float64))]


@pytest.mark.parametrize("relu", [False, True])
def test_close_to_tensorflows_own_ops(relu: bool) -> None:
    data = step((8, 6, 5, 4))
    got = train(data, epsilon=EPSILON, momentum=MOMENTUM, activation="relu" if relu else None)
    for ours, theirs in zip(got, plain(data, [0, 1, 2], relu), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)
    wide = Step(*(None if t is None else t.astype(np.float64) for t in data))
    got = train(wide, epsilon=EPSILON, momentum=MOMENTUM, activation="relu" if relu else None)
    for i, (ours, theirs) in enumerate(zip(got, plain(wide, [0, 1, 2], relu), strict=True)):
        # The weights of the moving statistics are float32 numbers in every dtype.
        np.testing.assert_allclose(ours, theirs, rtol=1e-7 if i in (1, 2) else 1e-11, atol=1e-7 if i in (1, 2) else 1e-11)


def test_gradient_of_a_masked_step() -> None:
    data = step((4, 6, 3), dtype="float64", parameters="float64")._replace(residual=None)
    mask = np.arange(24).reshape(4, 6) % 3 > 0
    got = train(data._replace(mask=mask), epsilon=EPSILON)
    with tf.GradientTape() as tape:
        values = [tf.constant(t) for t in (data.x, data.gamma, data.beta)]
        tape.watch(values)
        x, gamma, beta = values
        mean, variance = tf.nn.moments(tf.boolean_mask(x, mask), [0])
        y = tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)
    expected = [y, *tape.gradient(y, values, output_gradients=tf.constant(data.dy))]
    for ours, theirs in zip([got[0], *got[3:]], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)


def test_mean_far_from_zero() -> None:
    """mean/std = 1e4, where TensorFlow's one-pass formula in float32 is off by 915."""
    x = (np.random.default_rng(0).standard_normal((64, 8, 8, 4)) + 1e4).astype(np.float32)
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    y = sync_batch_norm(x, ones, zeros, zeros, ones, training=True, epsilon=0.0)[0]
    wide = x.astype(np.float64)
    expected = (wide - wide.mean((0, 1, 2))) / wide.std((0, 1, 2))
    np.testing.assert_allclose(y, expected, atol=2e-6)


def test_evaluation() -> None:
    data = step((4, 5, 3))
    wide = [t.astype(np.float64) for t in (data.x, *data.state, data.residual)]
    x, gamma, beta, mean, variance, residual = wide
    expected = np.maximum((x - mean) / np.sqrt(variance + EPSILON) * gamma + beta + residual, 0)
    options: dict[str, Any] = {"training": False, "epsilon": EPSILON, "activation": "relu"}
    y, *moving = sync_batch_norm(data.x, *data.state, residual=data.residual, **options)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)
    assert_same_bits(moving, [data.mean, data.variance])
    first = [np.moveaxis(t, -1, 1) for t in (data.x, data.residual)]
    y = sync_batch_norm(first[0], *data.state, residual=first[1], axis=1, **options)[0]
    np.testing.assert_allclose(np.moveaxis(y, 1, -1), expected, rtol=2e-6, atol=2e-6)
    half = sync_batch_norm(data.x.astype(np.float16), *data.state, training=False)[0]
    assert half.dtype == tf.float16


# ---- Special input


def test_nonfinite_values_spoil_their_channel_alone() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        data = step((4, 5, 3))
        clean = train(data)
        data.x[1, 2, 1] = bad
        for got, expected in zip(train(data), clean, strict=True):
            got, expected = np.asarray(got), np.asarray(expected)
            if got is not clean[6]:
                assert same_bits(got[..., [0, 2]], expected[..., [0, 2]])
        y, mean, variance, dx, dgamma, dbeta, dresidual = train(data)
        for spoilt in (y, dx, dgamma, dbeta):
            assert np.isnan(np.asarray(spoilt)[..., 1]).all()
        for kept, old in ((mean, data.mean), (variance, data.variance)):
            assert kept[1] == old[1]
        assert same_bits(dresidual, clean[6])


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 4, 3), (2, 0, 3)], ids=str)
def test_empty_batch(shape: tuple[int, ...]) -> None:
    data = step(shape)
    for got in (train(data), in_graph(lambda: train(data))()):
        assert_same_bits(got[1:3], [data.mean, data.variance])
        assert got[0].shape == got[3].shape == shape
        assert_same_bits(got[4:6], [np.zeros(3, np.float32)] * 2)


def test_no_channels() -> None:
    empty = np.zeros(0, np.float32)
    y, *moving = sync_batch_norm(np.zeros((2, 0), np.float32), empty, empty, empty, empty, training=True)
    assert y.shape == (2, 0)
    assert_same_bits(moving, [empty, empty])


def test_nothing_unmasked() -> None:
    """Normalized as Keras does, with mean and variance 0; the moving statistics stay."""
    data = step((4, 5, 3))._replace(residual=None, mask=np.zeros((4, 5)))
    y, mean, variance, dx, *_ = train(data, epsilon=EPSILON)
    scale = data.gamma / np.sqrt(EPSILON)
    np.testing.assert_allclose(y, data.x * scale + data.beta, rtol=1e-5)
    np.testing.assert_allclose(dx, data.dy * scale, rtol=1e-5)
    assert_same_bits([mean, variance], [data.mean, data.variance])


def test_a_mask_broadcasts() -> None:
    data = step((3, 4, 5, 2))
    for shape in ((3, 1, 5), (1, 4, 1), (1, 1, 5)):
        mask = np.arange(np.prod(shape)).reshape(shape) % 2 == 0
        full = np.broadcast_to(mask, (3, 4, 5))
        assert_same_bits(train(data._replace(mask=mask)), train(data._replace(mask=full.astype(np.float32))))


# ---- Bad input


def call(x: Any = None, **options: Any) -> Any:
    x = np.ones((4, 5, 3), np.float32) if x is None else x
    ones = np.ones(3, np.float32)
    arguments = {"gamma": ones, "beta": ones, "moving_mean": ones, "moving_variance": ones, "training": True} | options
    return sync_batch_norm(x, **arguments)


F32 = np.float32
BAD: list[tuple[str, type[Exception], str, Callable[[bool], Any]]] = [
    ("integers", TypeError, "dtype=int32", lambda t: call(np.ones((4, 3), np.int32), training=t)),
    ("complex", TypeError, "dtype=complex64", lambda t: call(np.ones((4, 3), np.complex64), training=t)),
    ("one dim", ValueError, r"shape=\(3,\)", lambda t: call(np.ones(3, F32), training=t)),
    (
        "channels",
        ValueError,
        r"shape \(3,\) for x of shape \(4, 2\)",
        lambda t: call(np.ones((4, 2), F32), training=t),
    ),
    ("axis", ValueError, "axis=3", lambda t: call(axis=3, training=t)),
    ("activation", ValueError, "activation='gelu'", lambda t: call(activation="gelu", training=t)),
    ("residual", ValueError, r"Received: \(4, 5, 2\)", lambda t: call(residual=np.ones((4, 5, 2), F32), training=t)),
    ("residual broadcast", ValueError, r"\(3,\)", lambda t: call(residual=np.ones(3, F32), training=t)),
    ("residual dtype", TypeError, "float64", lambda t: call(residual=np.ones((4, 5, 3)), training=t)),
    ("parameter dtype", TypeError, "float32, int32", lambda t: call(gamma=np.ones(3, np.int32), training=t)),
    ("mixed dtypes", TypeError, "float32, float64", lambda t: call(gamma=np.ones(3), training=t)),
    ("no moving mean", ValueError, "moving_mean=None", lambda t: call(moving_mean=None, training=t)),
    ("mask dims", ValueError, r"mask.shape=\(4, 5, 3\)", lambda t: call(mask=np.ones((4, 5, 3)), training=t)),
    ("mask shape", ValueError, r"mask.shape=\(4, 2\)", lambda t: call(mask=np.ones((4, 2)), training=t)),
    ("mask axis", ValueError, "axis=1", lambda t: call(np.ones((4, 3, 5), F32), axis=1, mask=np.ones((4, 3)), training=t)),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("error", "message", "act"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(error: type[Exception], message: str, act: Callable[[bool], Any], training: bool) -> None:
    for run in (act, in_graph(act)):
        with pytest.raises(error, match=message) as caught:
            run(training)
        assert "Received: " in str(caught.value)


def test_unknown_rank() -> None:
    @tf.function(input_signature=[tf.TensorSpec(None)], autograph=False)
    def run(x: Any) -> Any:
        return call(x)

    with pytest.raises(ValueError, match="known number"):
        run(np.ones((4, 3), F32))


def test_shapes_that_only_show_at_run_time() -> None:
    spec = tf.TensorSpec([None, None, 3])

    @tf.function(input_signature=[spec, spec], autograph=False)
    def run(x: Any, residual: Any) -> Any:
        return call(x, residual=residual)

    with pytest.raises(tf.errors.InvalidArgumentError, match=r"residual of shape \[4,5,3\]. Received: \[5,4,3\]"):
        run(np.ones((4, 5, 3), F32), np.ones((5, 4, 3), F32))


def test_one_value_per_channel() -> None:
    one = np.ones((1, 3), F32)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel .*'my_layer'.* \[1,3\]") as caught:
        call(one, name="my_layer")
    assert "{{" not in str(caught.value)
    with pytest.raises(tf.errors.InvalidArgumentError, match="Expected more than 1 value per channel"):
        in_graph(lambda: call(one))()
    assert np.isfinite(call(one, training=False)[0]).all()


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("loss", second.LOSSES)
def test_a_loss_with_gradients_in_it(loss: str, graph: bool) -> None:
    second.check(loss, list(range(8)), 8, lambda tensor: tensor, in_graph if graph else lambda function: function)


@pytest.mark.parametrize("options", ["channels_first", "relu", "mask", "frozen"])
def test_second_derivatives(options: str) -> None:
    """Of x, gamma, beta, the residual and dy, beside the definition by TensorFlow's operations."""
    rng = np.random.default_rng(2)
    given = [rng.standard_normal(shape) for shape in ((3, 4, 5), (5,), (5,), (3, 4, 5), (3, 4, 5))]
    mask = rng.random((3, 4)) < 0.6 if options == "mask" else None
    relu = tf.nn.relu if options == "relu" else lambda y: y

    def expected(x: Any, gamma: Any, beta: Any, residual: Any) -> Any:
        if options == "frozen":
            return relu((x - 0.5) / np.sqrt(2 + second.EPSILON) * gamma + beta + residual)
        return relu(second.definition(x, gamma, beta, "", mask) + residual)

    def ours(x: Any, gamma: Any, beta: Any, residual: Any) -> Any:
        activation = "relu" if options == "relu" else None
        if options == "frozen":
            half = tf.fill([5], tf.constant(0.5, tf.float64))
            return frozen_batch_norm(
                x, gamma, beta, half, 4 * half, epsilon=second.EPSILON, residual=residual, activation=activation, learns=True
            )
        if options == "channels_first":
            swap = (0, 2, 1)
            y = second.synchronized(tf.transpose(x, swap), gamma, beta, "", axis=1, residual=tf.transpose(residual, swap))
            return tf.transpose(y, swap)
        return second.synchronized(x, gamma, beta, "", mask=mask, residual=residual, activation=activation)

    def seconds(function: Callable[..., Any]) -> list[Any]:
        *inputs, dy = values = [tf.constant(v) for v in given]
        with tf.GradientTape() as outer:
            outer.watch(values)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                y = function(*inputs)
            firsts = inner.gradient(y, inputs, dy)
            loss = sum(tf.reduce_sum(tf.sin(first)) for first in firsts)
        return [*firsts, *outer.gradient(loss, values, unconnected_gradients="zero")]

    for got, want in zip(seconds(ours), seconds(expected), strict=True):
        np.testing.assert_allclose(got, want, **second.TOLERANCE)


def test_a_recorded_gradient_has_the_same_bytes() -> None:
    data = step((4, 3))
    x = tf.constant(data.x)
    found = []
    for records in (True, False):
        with tf.GradientTape() as outer, tf.GradientTape() as inner:
            inner.watch(x)
            if records:
                outer.watch(x)
            y = sync_batch_norm(x, data.gamma, None, data.mean, data.variance, training=True, activation="relu")[0]
            gradient = inner.gradient(y, x)
        found.append(gradient)
        assert (outer.gradient(gradient, x) is not None) == records
    assert_same_bits([found[0]], [found[1]])


# ---- Installation


@pytest.fixture
def built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    def find(name: str) -> Path:
        path = tmp_path / Path(name).name
        if not path.exists():
            raise ImportError(f"hvd-syncbn was built without {name}")
        return path

    monkeypatch.setattr(native, "find", find)
    ops.library.cache_clear()
    yield tmp_path
    ops.library.cache_clear()


def test_a_library_for_another_tensorflow(built_for: Path) -> None:
    (built_for / "libhvd_syncbn_tf.so").touch()
    (built_for / "built_for.txt").write_text("2.3.4")
    with pytest.raises(ImportError, match=r"TensorFlow 2\.3\.4, and .* is installed\. .*`make setup` .*pip install"):
        ops.library()


def test_no_library(built_for: Path) -> None:
    with pytest.raises(ImportError, match="built without tf_impl/libhvd_syncbn_tf"):
        ops.library()


CALL = """
import numpy as np
from hvd_syncbn.tensorflow import sync_batch_norm
v = np.ones(3, "f4")
x = np.ones((2, 3), "f4")
print(sync_batch_norm(x, v, v, v, v, training=False)[0].shape)
try:
    sync_batch_norm(x, v, v, v, v, training=True)
except RuntimeError as error:
    print(error)
"""
PREPARED = {
    "no Horovod": 'sys.modules["horovod"] = None',
    "Horovod without TensorFlow": 'sys.modules["horovod.tensorflow"] = None',
    "not initialized": "",
}
# The processes are forked from one that has imported TensorFlow.
FORKS = """
import os, sys, traceback
import tensorflow
for code in {codes!r}:
    if os.fork() == 0:
        try:
            exec(code, {{"sys": sys}})
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.wait()[1] == 0
    print({end!r}, flush=True)
"""


@cache
def outputs() -> dict[str, str]:
    """What calls of the layer print, by what a process lacks."""
    end = "--- end of a process"
    code = FORKS.format(codes=[f"{prepare}\n{CALL}" for prepare in PREPARED.values()], end=end)
    env = {"TF_CPP_MIN_LOG_LEVEL": "3", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(PREPARED, done.stdout.split(end), strict=False))


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("no Horovod", "hvd-syncbn build-horovod"),
        ("Horovod without TensorFlow", "hvd-syncbn build-horovod"),
        ("not initialized", "call `horovod.tensorflow.init()`"),
    ],
)
def test_training_needs_horovod_and_evaluation_does_not(lacks: str, message: str) -> None:
    shape, text = outputs()[lacks].strip().split("\n", 1)
    assert shape == "(2, 3)"
    assert message in text
