"""Evaluation leaves Python: torch.export, TorchScript and ONNX, of converted models and of reverted ones.

The files are run by a process in which neither Horovod nor this package can be imported.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import horovod.torch as hvd
import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hvd_syncbn.torch import SyncBatchNorm, SyncBatchNorm2d, convert_sync_batchnorm, revert_sync_batchnorm
from tests.torch_tools import assert_same, randn, randomize, step
from tests.unit.test_torch_convert import CONVERTED, OnlyRenamed, WithActivation

# PyTorch's exporters and compilers use their own deprecated parts, and announce that TorchScript is.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()


class Plain(nn.Module):
    """Norms of every dimension, options, one used twice, and one of an image library's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.twice = nn.BatchNorm2d(4, momentum=None)
        self.other = nn.BatchNorm2d(4, affine=False)
        self.act = WithActivation(4)
        self.deep = nn.BatchNorm3d(4)
        self.last = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.other(self.twice(self.twice(self.stem(x)) + 1)))
        x = self.deep(x.unsqueeze(4))
        return self.last(x.mean((2, 3, 4)))


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fused = SyncBatchNorm(3, activation="relu")
        self.plain = SyncBatchNorm2d(3, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.fused(self.conv(x), residual=x))


def model(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomize(make())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "converted": lambda: convert_sync_batchnorm(model(Plain)),
    "converted and reverted": lambda: revert_sync_batchnorm(convert_sync_batchnorm(model(Plain))),
    "by hand": lambda: model(ByHand),
    "by hand, reverted": lambda: revert_sync_batchnorm(model(ByHand)),
}
X = randn(1, 5, 3, 6, 6)
OTHER = randn(2, 2, 3, 6, 6)


def exported(module: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(module, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def scripted(module: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    torch.jit.script(module).save(path)
    return torch.jit.load(path)


def traced(module: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)  # our code does not depend on values
        torch.jit.trace(module, X).save(path)
    return torch.jit.load(path)


def to_onnx(module: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    batch = torch.export.Dim("batch", min=2)
    torch.onnx.export(module, (X,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


# Runs a file of each kind in a process without hvd-syncbn.
RUN = {
    exported: "torch.export.load(path).module()(x)",
    scripted: "torch.jit.load(path)(x)",
    traced: "torch.jit.load(path)(x)",
    to_onnx: "onnxruntime.InferenceSession(path).run(None, {name: x.numpy()})[0]",
}
PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("horovod", "hvd_syncbn", "torch_impl"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import numpy as np, onnxruntime, torch

torch.set_num_threads(1)
torch.set_grad_enabled(False)
x, name = torch.from_numpy(np.load("x.npy")), "x"
"""


@pytest.mark.parametrize("write", RUN)
@pytest.mark.parametrize("kind", MODELS)
def test_deployed(kind: str, write: Callable[[nn.Module, Path], Callable[[Tensor], Tensor]], tmp_path: Path) -> None:
    """A file gives the model's outputs, also for another batch size, and making it changes nothing."""
    module = MODELS[kind]().eval()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    function = write(module, path_in(tmp_path, kind, write))
    for x in (X, OTHER):
        compare(write, function(x), module(x))
    assert_same(dict(module.state_dict()), state)


def test_the_package_is_absent(tmp_path: Path) -> None:
    """Neither Horovod nor this package can be imported where the files of directly deployed models run."""
    np.save(tmp_path / "x.npy", OTHER.numpy())
    program, kinds = PROGRAM, ("converted", "by hand")
    for kind in kinds:
        for write, run in RUN.items():
            path = path_in(tmp_path, kind, write)
            write(MODELS[kind]().eval(), path)
            program += f"path = {path.name!r}\nnp.save(path + '.npy', np.asarray({run}))\n"
    program += "assert not any(name.split('.')[0] in ('horovod', 'hvd_syncbn') for name in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    for kind in kinds:
        for write in RUN:
            got = np.load(f"{path_in(tmp_path, kind, write)}.npy")
            compare(write, torch.from_numpy(got), MODELS[kind]().eval()(OTHER))


def path_in(folder: Path, kind: str, write: Callable[..., object]) -> Path:
    return folder / f"{kind.replace(' ', '_')}.{write.__name__}.{'onnx' if write is to_onnx else 'pt2'}"


def compare(write: Callable[..., object], got: Tensor, want: Tensor) -> None:
    """PyTorch's own bytes; onnxruntime has convolutions of its own, and folds norms into them: float32 rounding, 7 layers."""
    if write is to_onnx:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-6, atol=1e-6)  # threads split convolutions


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, OnlyRenamed, WithActivation])
def test_script_a_lone_layer(cls: type[nn.Module]) -> None:
    x = randn(1, 4, 3, *{nn.BatchNorm1d: (2,), nn.BatchNorm3d: (2, 2, 2)}.get(cls, (2, 2)))
    layer = randomize(cls(3)).eval()
    want = layer(x)
    assert_same(torch.jit.script(convert_sync_batchnorm(layer))(x), want)
    assert_same(torch.jit.script(revert_sync_batchnorm(layer))(x), want)


def test_script_without_running_statistics() -> None:
    layer = convert_sync_batchnorm(randomize(nn.BatchNorm2d(3, track_running_stats=False))).eval()
    assert_same(torch.jit.script(layer)(X), layer(X))


def test_script_refuses_what_the_layer_refuses() -> None:
    scripted = torch.jit.script(randomize(SyncBatchNorm(3, activation="relu")).eval())
    for arguments, text in (
        ((torch.zeros(3),), "at least 2 dimensions"),
        ((torch.zeros(4, 3), torch.zeros(4, 1)), "residual of the input's shape"),
    ):
        with pytest.raises(torch.jit.Error, match=text):
            scripted(*arguments)


@pytest.mark.parametrize("make", [lambda: SyncBatchNorm(3), lambda: convert_sync_batchnorm(nn.BatchNorm2d(3))])
def test_no_training_in_torchscript(make: Callable[[], nn.Module]) -> None:
    """Its statistics would be this rank's alone."""
    scripted = torch.jit.script(make())
    with pytest.raises(torch.jit.Error, match=r"does not synchronize in TorchScript.*\.eval\(\).*revert_sync_batchnorm"):
        scripted(X)
    scripted.eval()(X)


def test_no_training_of_a_subclass_in_torchscript() -> None:
    """TorchScript would compile the user-defined forward without redirection, so it raises before that."""
    layer = convert_sync_batchnorm(nn.Sequential(WithActivation(3)))
    with pytest.raises(RuntimeError, match=r"does not synchronize in TorchScript.*\.eval\(\).*SyncWithActivation in training"):
        torch.jit.script(layer)
    torch.jit.script(revert_sync_batchnorm(layer))


def test_a_reverted_layer_trains_in_torchscript() -> None:
    layer = revert_sync_batchnorm(randomize(SyncBatchNorm(3, momentum=None, activation="relu")))
    twin = copy.deepcopy(layer)
    scripted = torch.jit.script(layer)
    for seed in range(2):
        x, dy = randn(seed, 4, 3, 5), randn(seed + 2, 4, 3, 5)
        assert_same(step(scripted, x, dy, x), step(twin, x, dy, x))


@pytest.mark.parametrize("cls", CONVERTED)
def test_trace_and_export_of_subclasses(cls: type[nn.Module], tmp_path: Path) -> None:
    module = convert_sync_batchnorm(nn.Sequential(randomize(cls(3)))).eval()
    for write in (exported, traced):
        assert_same(write(module, tmp_path / "file.pt2")(OTHER), module(OTHER))
