"""The PyTorch layer in one process: empty, bad and non-finite input, and Horovod, PyTorch or a GPU that is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor

from hvd_syncbn.torch import SyncBatchNorm, check_device_errors, sync_batch_norm
from hvd_syncbn.torch_impl import ops
from tests.torch_tools import (
    DTYPES,
    assert_same,
    randn,
    randomize,
    step,
)


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()
    assert hvd.size() == 1


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 6, 7), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_empty_batch(shape: tuple[int, ...], activation: str | None) -> None:
    layer = randomize(SyncBatchNorm(5, activation=activation))
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    got = step(layer, torch.empty(shape), torch.empty(shape), torch.empty(shape))
    for name in ("y", "dx", "dresidual"):
        assert got[name].shape == shape
    assert_same([got[name] for name in ("dweight", "dbias")], [torch.zeros(5), torch.zeros(5)])
    assert_same([got["running_mean"], got["running_var"]], [mean, var])


X = torch.zeros(4, 3, 2)
BAD: list[tuple[Any, type[Exception], list[str]]] = [
    (lambda f: f(torch.zeros(3)), ValueError, ["2 dimensions", "(3,)"]),
    (lambda f: f(torch.tensor(1.0)), ValueError, ["2 dimensions", "()"]),
    (lambda f: f(torch.zeros(2, 4, 5)), ValueError, ["3", "Received", "4", "(2, 4, 5)"]),
    (lambda f: f(X.long()), TypeError, ["float32", "torch.int64"]),
    (lambda f: f(X.bool()), TypeError, ["float32", "torch.bool"]),
    (lambda f: f(X.to(torch.complex64)), TypeError, ["float32", "torch.complex64"]),
    (lambda f: f(X.to(torch.float8_e4m3fn)), TypeError, ["float32", "torch.float8_e4m3fn"]),
    (lambda f: f(X, residual=torch.zeros(4, 3)), ValueError, ["residual", "(4, 3, 2)", "(4, 3)"]),
    (lambda f: f(X, residual=torch.zeros(4, 3, 1)), ValueError, ["residual", "(4, 3, 2)", "(4, 3, 1)"]),
    (lambda f: f(X, residual=X.double()), TypeError, ["residual", "torch.float32", "torch.float64"]),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize(("call", "error", "fragments"), BAD)
def test_bad_input(
    call: Any, error: type[Exception], fragments: list[str], functional: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error that names what came, before anything is sent or changed."""
    layer = randomize(SyncBatchNorm(3)).train(training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}

    def function(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return sync_batch_norm(x, layer.running_mean, layer.running_var, training=training, residual=residual)

    monkeypatch.setattr(ops, "sync_batch_norm", lambda *_: pytest.fail("an operator was called"))
    with pytest.raises(error) as caught:
        call(function if functional else layer)
    assert type(caught.value) is error
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert_same(dict(layer.state_dict()), before)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_vector_of_another_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "sync_batch_norm", lambda *_: pytest.fail("an operator was called"))
    vectors = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), name: torch.zeros(7)}
    with pytest.raises(ValueError, match=rf"{name} .* 3 channels .*Received: shape \(7,\)"):
        sync_batch_norm(X, **vectors)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="'gelu'"):
        SyncBatchNorm(3, activation="gelu")
    with pytest.raises(ValueError, match="'gelu'"):
        sync_batch_norm(X, None, None, activation="gelu")


def test_process_set_unknown_to_horovod() -> None:
    layer = SyncBatchNorm(3, process_set=hvd.ProcessSet([0]))
    with pytest.raises(ValueError, match=r"not registered.*add_process_set.*Received: ProcessSet"):
        layer(X)
    assert layer.num_batches_tracked == 0
    layer.eval()(X)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)], ids=str)
def test_one_value_per_channel(shape: tuple[int, ...]) -> None:
    layer = randomize(SyncBatchNorm(3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=rf"Expected more than 1 value per channel when training.*{layer.collective_name}"):
        layer(torch.zeros(shape))
    assert_same(dict(layer.state_dict()), before)
    layer.eval()(torch.zeros(shape))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_nonfinite(dtype: torch.dtype, value: float) -> None:
    """One bad value is NaN in its channel, in everything but the running statistics, and nowhere else."""
    x, dy = (randn(seed, 4, 5, 6, 7, dtype=dtype) for seed in (1, 2))
    good = step(SyncBatchNorm(5), x, dy)
    x[2, 3, 1, 4] = value
    got = step(SyncBatchNorm(5), x, dy)
    rest = [0, 1, 2, 4]
    for name in ("y", "dx"):
        assert got[name][:, 3].isnan().all()
        assert_same(got[name][:, rest], good[name][:, rest])
    assert got["dweight"][3].isnan()
    assert got["running_mean"][3] == 0 and got["running_var"][3] == 1
    for name in ("dweight", "running_mean", "running_var"):
        assert_same(got[name][rest], good[name][rest])


def test_nonfinite_gradient() -> None:
    x, dy = randn(1, 4, 5, 6), randn(2, 4, 5, 6)
    good = step(SyncBatchNorm(5), x, dy)
    dy[1, 2, 3] = torch.inf
    got = step(SyncBatchNorm(5), x, dy)
    assert_same(got["y"], good["y"])
    assert got["dx"][:, 2].isnan().all() and not got["dbias"][2].isfinite() and not got["dweight"][2].isfinite()
    rest = [0, 1, 3, 4]
    assert_same(got["dx"][:, rest], good["dx"][:, rest])
    for name in ("dweight", "dbias"):
        assert_same(got[name][rest], good[name][rest])


# --- Without Horovod --------------------------------------------------------------------------------------------------


PROGRAM = """
import sys, torch
from hvd_syncbn.torch import SyncBatchNorm
layer, x = SyncBatchNorm(3), torch.ones(2, 3, 4)
"""


def run_python(code: str) -> str:
    """In a separate process, because Horovod stays initialized in this one."""
    command = [sys.executable, "-c", PROGRAM + code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return result.stdout


FAILS = """
try:
    layer(x)
except RuntimeError as error:
    print(type(error).__name__, error)
"""


def test_evaluation_needs_no_horovod() -> None:
    output = run_python(
        """
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "horovod":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
assert not any(name.split(".")[0] == "horovod" for name in sys.modules)
print(layer.eval()(x).sum().item())
layer.train()
"""
        + FAILS
    )
    evaluated, error = output.splitlines()
    assert float(evaluated) == pytest.approx(24, rel=1e-4)  # 24 / sqrt(1 + eps)
    assert error.startswith("RuntimeError") and "PyTorch" in error and "`hvd-syncbn build-horovod`" in error


def test_horovod_not_initialised_or_not_loading() -> None:
    output = run_python(
        FAILS
        + """
print(layer.num_batches_tracked.item(), layer.eval()(x).sum().item())
layer.train()
from hvd_syncbn import horovod
horovod.load.cache_clear()
for name in [name for name in sys.modules if name.split(".")[0] == "horovod"]:
    del sys.modules[name]
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "horovod.torch":
            raise ImportError("mpi_lib_v2.so: undefined symbol\\nand more")
sys.meta_path.insert(0, Broken())
"""
        + FAILS
    )
    uninitialised, evaluated, broken = output.splitlines()
    assert uninitialised.startswith("RuntimeError") and "horovod.torch.init()" in uninitialised
    assert evaluated.split()[0] == "0" and float(evaluated.split()[1]) == pytest.approx(24, rel=1e-4)
    assert "does not load for PyTorch" in broken and "`hvd-syncbn build-horovod`" in broken and "undefined symbol" in broken


def test_device_errors_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU there is nothing to report; naming a GPU that does not exist raises an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device_errors()
    with pytest.raises(RuntimeError, match=r"no GPU can be used here.*Received: device=cuda:1"):
        check_device_errors("cuda:1")


def test_an_old_pytorch_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"not synchronized there\. Received: 2\.4\.1"):
        ops.warn_if_older("2.4.1+cu124")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("2.13.0+cpu", "2.14.1", "3.0.0a0+git12"):
            ops.warn_if_older(version)
