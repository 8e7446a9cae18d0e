"""The examples in docstrings and in the documentation run, and give what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
import textwrap
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.needs import need

ROOT = Path(__file__).parents[2]
MODULES = [
    name.removesuffix(".py").replace("/", ".")
    for name in sorted(glob("hvd_syncbn/**/*.py", root_dir=ROOT, recursive=True))
    if ">>> " in (ROOT / name).read_text()
]
PAGES = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if ">>> " in path.read_text()]


@pytest.mark.sources
@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


@pytest.mark.parametrize("page", PAGES)
def test_pages(page: str) -> None:
    need("torch", "horovod.torch")
    result = doctest.testfile(str(ROOT / "docs" / page), module_relative=False)
    assert result.attempted and not result.failed


def test_tables_are_tables() -> None:
    """A line break lost between two rows makes text of them."""
    pages = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
    assert len(pages) > 10
    for page in pages:
        for line in page.read_text().splitlines():
            assert not re.search(r"\|\s+\|-", line), f"{page.name}: {line[:80]}"


@pytest.mark.sources
@pytest.mark.parametrize("face", ["torch", "keras", "tensorflow"])
def test_every_public_name_is_in_the_reference(face: str) -> None:
    module = importlib.import_module(f"hvd_syncbn.{face}")
    listed = re.findall(r"^::: (\S+)\.(\w+)$", (ROOT / "docs" / "api" / f"{face}.md").read_text(), re.MULTILINE)
    for room, name in listed:
        assert (ROOT / f"{room.replace('.', '/')}.py").exists(), room
        assert getattr(module.elastic if room.endswith("elastic") else module, name).__doc__
    ours = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (getattr(value, "__module__", None) or "").startswith("hvd_syncbn.")
    }
    assert ours and ours <= {name for _, name in listed}


def test_snippets_import_what_there_is() -> None:
    """Python in the pages parses, and what it imports from here exists."""
    need("torch", "keras", "horovod.torch", "horovod.tensorflow")
    blocks = 0
    for page in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]:
        for block in re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
            blocks += 1
            for step in ast.walk(ast.parse(textwrap.dedent(block[1]))):
                if isinstance(step, ast.ImportFrom) and (step.module or "").startswith("hvd_syncbn"):
                    module = importlib.import_module(str(step.module))
                    assert all(hasattr(module, name.name) for name in step.names), f"{page.name}: {ast.unparse(step)}"
    assert blocks > 20


def test_sources_name_tests_that_exist() -> None:
    text = (ROOT / "docs" / "sources.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 2 * (text.count("\n| ") - 1)
    for path, name in named:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"


def test_segmentation_deals_patches_out() -> None:
    """Every rank its own; together those of one process; every class in the strips of either purpose."""
    need("matplotlib", "sklearn")
    photos = load("photos", "examples/segmentation")
    train, test = photos.load()
    for strips in (train, test):
        assert set(np.unique(np.concatenate([classes.reshape(-1) for _, classes in strips]))) == {0, 1, 2}
    x, y = zip(*(photos.patches(train, rank, 2) for rank in range(2)), strict=True)
    assert x[0].shape == (photos.STEPS, 1, 64, 64, 1) and y[0].shape == (photos.STEPS, 1, 64, 64)
    assert x[0].tobytes() != x[1].tobytes()
    photos.STEPS *= 2  # one rank, as many patches
    whole = photos.patches(train, 0, 1)
    for parts, everything in zip((x, y), whole, strict=True):
        assert np.stack(parts, 1).reshape(everything.shape).tobytes() == everything.tobytes()
    scores = photos.Scores(test)
    assert "mean IoU 1.000 accuracy 1.000" in scores.add([classes for _, classes in test])


def load(name: str, folder: str = "examples") -> Any:
    """A program as a module."""
    spec = importlib.util.spec_from_file_location(f"{Path(folder).name}_{name}", ROOT / folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_exchange_example(capsys: pytest.CaptureFixture[str]) -> None:
    """It ends in an error where the networks differ; and it would see one transposed kernel."""
    need("torch", "keras", "horovod.torch", "horovod.tensorflow")
    example = load("exchange")
    example.main()
    assert capsys.readouterr().out.count("every bit equal") == 2
    images = np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32)
    ours, theirs = example.trained(), example.keras_network()
    example.to_keras(ours, theirs)
    kernel, bias = theirs.layers[3].get_weights()
    theirs.layers[3].set_weights([kernel.swapaxes(0, 1), bias])
    assert np.abs(example.answers(theirs, images) - example.answers(ours, images)).max() > 100 * example.TOLERANCE


def test_adabn_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recalibrating wins accuracy back, and inserted norms change nothing but the last bits."""
    need("torch", "keras", "horovod.torch", "horovod.tensorflow", "sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = load("adabn")
    example.hvd.init()
    example.horovod.tensorflow.init()
    for adapts, inserts in ((example.torch_adapts, example.torch_inserts), (example.keras_adapts, example.keras_inserts)):
        old, new, adapted = adapts()
        assert old > 0.9 and new < old - 0.2 and adapted > new + (old - new) / 2
        change, largest = inserts()
        assert change < 1e-5 * largest
