"""docs/keras.md names all of Horovod's Keras API, and tests that are there."""

from __future__ import annotations

import ast
import operator
import re
from pathlib import Path

import pytest

pytest.importorskip("horovod.tensorflow")

import horovod.tensorflow

import hvd_syncbn.keras as ours

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| (`.*) \| .* \| (.*) \|$", (ROOT / "docs" / "keras.md").read_text().split("## Horovod's Keras")[1], re.M)


def test_every_row_has_a_test() -> None:
    checks = (ROOT / "tests" / "parallel" / "checks" / "keras_api.py").read_text()
    assert len(ROWS) > 15
    for name, tests in ROWS:
        found = re.findall("`(.*?)`", tests)
        assert found, name
        for test in found:
            assert (ROOT / "tests" / "parallel" / test).exists() or f"def {test}(" in checks, test


def public(module: Path, prefix: str = "") -> set[str]:
    """What a module of Horovod's defines or takes from another of Horovod's, read without importing it."""
    names: set[str] = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("horovod") and "util" not in str(node.module):
            names |= {alias.asname or alias.name for alias in node.names}
    return {prefix + name for name in names if not name.startswith("_")}


THEIRS = Path(horovod.tensorflow.__file__).parents[1]
MODULES = {"": "__init__.py", "callbacks.": "callbacks.py", "elastic.": "elastic.py"}


@pytest.mark.parametrize("package", ["keras", "tensorflow/keras"])
@pytest.mark.parametrize("prefix", MODULES)
def test_every_name_of_theirs(package: str, prefix: str) -> None:
    """Whatever Horovod's modules have, the table and ours have."""
    theirs = public(THEIRS / package / MODULES[prefix], prefix) - {"callbacks", "elastic"}
    assert len(theirs) > 3
    table = {name for names, _ in ROWS for name in re.findall("`(.*?)`", names)}
    assert theirs <= table, theirs - table
    for name in theirs:
        assert operator.attrgetter(name)(ours) is not None


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        ours.nothing  # noqa: B018
    assert {"init", "elastic", "allreduce", "SyncBatchNormalization"} <= set(dir(ours))
