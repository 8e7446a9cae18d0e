"""docs/keras.md names all of Horovod's Keras API, and tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("horovod.tensorflow")

import horovod.tensorflow.keras as theirs

import hvd_syncbn.keras as ours

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| (`.*) \| .* \| (.*) \|$", (ROOT / "docs" / "keras.md").read_text().split("## Horovod's Keras")[1], re.M)


def test_every_row_has_a_test() -> None:
    checks = (ROOT / "tests" / "parallel" / "checks_keras_api.py").read_text()
    assert len(ROWS) > 15
    for name, tests in ROWS:
        found = re.findall("`(.*?)`", tests)
        assert found, name
        for test in found:
            assert (ROOT / "tests" / "parallel" / test).exists() or f"def {test}(" in checks, test


def test_every_name_of_theirs() -> None:
    """Whatever Horovod's module has, ours has or the page says that it has not."""
    page = (ROOT / "docs" / "keras.md").read_text()
    own = [
        name
        for name in dir(theirs)
        if not name.startswith("_") and name not in ("K", "keras", "tf", "inspect", "version", "warnings")
    ]
    for module, names in (("", own), ("callbacks", dir(theirs.callbacks)), ("elastic", theirs.elastic.__all__)):
        for name in names:
            if module == "callbacks" and not name.endswith(("Callback", "Checkpoint")):
                continue
            if name in ("is_version_greater_equal_than", "load_model"):  # no name of Horovod's; of saving.py
                continue
            assert hasattr(getattr(ours, module) if module else ours, name), name
            if module:
                assert f"`{module}.{name}`" in page, name


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        ours.nothing  # noqa: B018
    assert {"init", "elastic", "allreduce", "SyncBatchNormalization"} <= set(dir(ours))
