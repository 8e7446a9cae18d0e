"""A model that was trained here, used where neither Horovod nor this package is installed: docs/elsewhere.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "elsewhere.md"

# Runs a program with a folder's files, in a process that has neither Horovod nor this package.
ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("horovod", "hvd_syncbn", "torch_impl", "tf_impl"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import numpy as np
x = np.load("x.npy")
"""
TORCH_MODEL = """
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))
"""
X = np.random.default_rng(0).standard_normal((5, 3, 6, 6)).astype(np.float32)


def run_elsewhere(folder: Path, program: str) -> np.ndarray:
    """Run a program that sets `y` from `x`; return `y`."""
    np.save(folder / "x.npy", X)
    code = ABSENT + program + "\nnp.save('y.npy', np.asarray(y))\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return np.load(folder / "y.npy")


@pytest.fixture
def network() -> Any:
    """A PyTorch network, converted and trained for a step."""
    hvd = pytest.importorskip("horovod.torch")
    hvd.init()
    import torch

    from hvd_syncbn.torch import convert_sync_batchnorm

    names: dict[str, Any] = {}
    exec(TORCH_MODEL, names)
    torch.manual_seed(0)
    model = convert_sync_batchnorm(names["Network"]())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.from_numpy(X)).square().sum().backward()
    optimizer.step()
    return model.eval()


def torch_outputs(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        outputs: np.ndarray = model(torch.from_numpy(X)).numpy()
    return outputs


# How a checkpoint of common tools wraps a state_dict, and how plain PyTorch unwraps it.
WRAPPED = {
    "plain": ("state", "state"),
    "DistributedDataParallel": (
        "{f'module.{k}': v for k, v in state.items()}",
        "{k.removeprefix('module.'): v for k, v in state.items()}",
    ),
    "Lightning": (
        "{'state_dict': {f'model.{k}': v for k, v in state.items()}, 'epoch': 1}",
        "{k.removeprefix('model.'): v for k, v in state['state_dict'].items()}",
    ),
    "timm": ("{'arch': 'network', 'state_dict': state, 'epoch': 1}", "state['state_dict']"),
}


@pytest.mark.parametrize("tool", WRAPPED)
def test_a_state_dict(network: Any, tool: str, tmp_path: Path) -> None:
    """Strictly, into plain PyTorch: the same bytes in evaluation, and the count of batches."""
    import torch

    wrap, unwrap = WRAPPED[tool]
    torch.save(eval(wrap, {"state": network.state_dict()}), tmp_path / "checkpoint.pt")
    program = TORCH_MODEL + (
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "model = Network().eval()\n"
        "state = torch.load('checkpoint.pt', weights_only=True)\n"
        f"model.load_state_dict({unwrap}, strict=True)\n"
        "assert int(model.backbone[1].num_batches_tracked) == 1\n"
        "y = model(torch.from_numpy(x)).detach()\n"
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run_elsewhere(tmp_path, program).tobytes() == torch_outputs(network).tobytes()
    finally:
        torch.set_num_threads(before)


def test_a_state_dict_comes_back(network: Any) -> None:
    """From plain PyTorch to a converted model: no key is missing or new."""
    import torch

    from hvd_syncbn.torch import convert_sync_batchnorm

    names: dict[str, Any] = {}
    exec(TORCH_MODEL, names)
    plain = names["Network"]()
    plain.load_state_dict(network.state_dict(), strict=True)
    again = convert_sync_batchnorm(names["Network"]())
    again.load_state_dict(plain.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), network.state_dict().values(), strict=True))


@pytest.fixture
def keras_network() -> Any:
    """A Keras network, converted and trained for a step."""
    hvd = pytest.importorskip("horovod.tensorflow")
    hvd.init()
    import keras

    from hvd_syncbn.keras import convert_sync_batchnorm

    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((3, 6, 6)),
        keras.layers.Permute((2, 3, 1)),
        keras.layers.Conv2D(4, 3, name="conv"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.ReLU(),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(2, name="head"),
    ]
    model = convert_sync_batchnorm(keras.Sequential(layers))
    model.compile("sgd", "mse")
    model.fit(X, np.zeros((5, 2)), batch_size=5, verbose=0)
    return model


KERAS_MODEL = """
import keras
model = keras.Sequential([
    keras.Input((3, 6, 6)), keras.layers.Permute((2, 3, 1)), keras.layers.Conv2D(4, 3, name="conv"),
    keras.layers.BatchNormalization(name="norm"), keras.layers.ReLU(), keras.layers.GlobalAveragePooling2D(),
    keras.layers.Dense(2, name="head"),
])
model.load_weights("model.weights.h5")
y = model(x, training=False)
"""


def test_keras_weights(keras_network: Any, tmp_path: Path) -> None:
    """Into plain Keras: the same bytes in evaluation."""
    keras_network.save_weights(tmp_path / "model.weights.h5")
    got = run_elsewhere(tmp_path, KERAS_MODEL)
    assert got.tobytes() == np.asarray(keras_network(X, training=False)).tobytes()


def test_keras_file(keras_network: Any, tmp_path: Path) -> None:
    from hvd_syncbn.keras import revert_sync_batchnorm

    expected = np.asarray(keras_network(X, training=False))
    revert_sync_batchnorm(keras_network).save(tmp_path / "model.keras")
    program = "import keras\ny = keras.models.load_model('model.keras', compile=False)(x, training=False)"
    assert run_elsewhere(tmp_path, program).tobytes() == expected.tobytes()


def test_saved_model(keras_network: Any, tmp_path: Path) -> None:
    keras_network.export(tmp_path / "exported", verbose=False)
    got = run_elsewhere(tmp_path, "import tensorflow as tf\nloaded = tf.saved_model.load('exported')\ny = loaded.serve(x)")
    assert got.tobytes() == np.asarray(keras_network.predict(X, verbose=0)).tobytes()


def test_tflite(keras_network: Any, tmp_path: Path) -> None:
    """TensorFlow Lite folds the norm into the convolution, which rounds: float32, two layers."""
    import tensorflow as tf

    (tmp_path / "model.tflite").write_bytes(tf.lite.TFLiteConverter.from_keras_model(keras_network).convert())
    program = (
        "import tensorflow as tf\n"
        "run = tf.lite.Interpreter('model.tflite')\n"
        "place = run.get_input_details()[0]['index']\n"
        "run.resize_tensor_input(place, x.shape)\n"
        "run.allocate_tensors()\n"
        "run.set_tensor(place, x)\n"
        "run.invoke()\n"
        "y = run.get_tensor(run.get_output_details()[0]['index'])\n"
    )
    np.testing.assert_allclose(run_elsewhere(tmp_path, program), keras_network(X, training=False), rtol=1e-5, atol=1e-6)


def test_the_page_names_these_tests() -> None:
    """Every test that the table names exists."""
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE.read_text())
    assert len(named) > 8
    for file, test in named:
        assert f"def {test}(" in (Path(__file__).parent / file).read_text(), (file, test)
