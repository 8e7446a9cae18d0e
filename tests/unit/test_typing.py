"""`py.typed` means something: users' scripts pass `mypy --strict` against the package as it is installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import hvd_syncbn
from tests.needs import need

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[1] / "typing"
CONFIG = """
[mypy]
strict = true
[mypy-horovod.*,keras.*,tensorflow.*]
ignore_missing_imports = true
"""


def installed(folder: Path) -> Path:
    """A Python with a copy of the package where `pip install` puts it, also if it is installed from a checkout (-e)."""
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    sources = {"hvd_syncbn": Path(hvd_syncbn.__file__).parent}
    for name in ("hvd_syncbn.torch_impl", "hvd_syncbn.tf_impl"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            sources[name] = Path(spec.origin).parent
    for name, source in sources.items():
        for path in source.rglob("*"):
            if path.suffix in (".py", ".pyi", ".typed"):
                target = packages / name.replace(".", "/") / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    (packages / "frameworks.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return folder / "bin" / "python"


@pytest.mark.parametrize("name, framework", [("user_torch", "torch"), ("user_keras", "keras")])
def test_a_users_script(name: str, framework: str, tmp_path: Path) -> None:
    need("mypy", framework)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    script = shutil.copy(SCRIPTS / f"{name}.py", tmp_path)  # out of the checkout, where mypy would find the sources
    python = str(installed(tmp_path / "env"))
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--python-executable", python]
    environment = {key: value for key, value in os.environ.items() if key not in ("MYPYPATH", "PYTHONPATH")}
    found = subprocess.run(
        [*command, "--cache-dir", "cache", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
