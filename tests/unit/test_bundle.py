"""``hvd-syncbn bundle``: what it collects, without building or fetching anything; tools/try_bundle.sh does both."""

import importlib.metadata
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from hvd_syncbn import cli, horovod_build
from hvd_syncbn.horovod_build import bundle as bundle_module
from hvd_syncbn.horovod_build import system

PACKAGES: dict[str, tuple[str, list[str]]] = {
    "torch": ("2.13.0+cpu", ["filelock", 'triton; platform_system == "Nowhere"']),
    "filelock": ("3.1", []),
    "rich": ("15.0", ["markdown_it.py[plugins]>=2"]),
    "markdown-it-py": ("4.0", ["mdurl", 'mdit-py-plugins; extra == "plugins"', 'pytest; extra == "testing"']),
    "mdurl": ("0.1", []),
    "mdit-py-plugins": ("0.5", ["markdown-it-py"]),
    "numpy": ("2.4", []),
    "psutil": ("7.2", []),
}


def make_wheel(path: Path, requires: list[str]) -> Path:
    name, version = path.name.split("-")[:2]
    text = "".join(f"Requires-Dist: {line}\n" for line in requires)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\n{text}\n")
    return path


class Installed:
    """What importlib.metadata says about an installed package."""

    def __init__(self, version: str, requires: list[str], origin: dict[str, Any] | None = None) -> None:
        self.version, self.requires, self.origin = version, requires, origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.origin is None else json.dumps(self.origin)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A machine with PACKAGES and hvd-syncbn installed from a checkout, and a pip that makes empty files; its commands."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    commands: list[list[str]] = []

    def distribution(name: str) -> Installed:
        if name == "hvd-syncbn":
            return Installed("0.1.0", [], {"url": checkout.as_uri(), "dir_info": {"editable": True}})
        if name not in PACKAGES:
            raise importlib.metadata.PackageNotFoundError(name)
        return Installed(*PACKAGES[name])

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        assert command[1:3] == ["-m", "pip"]
        folder = Path(command[command.index("--wheel-dir") + 1])
        for wanted in command[command.index("--wheel-dir") + 2 :]:
            if wanted.startswith(("/", "hvd-syncbn")):
                make_wheel(folder / "hvd_syncbn-0.1.0-cp311-cp311-linux_x86_64.whl", ["numpy", "rich", 'onnx; extra == "onnx"'])
            else:
                name, _, version = wanted.partition("==")
                (folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(bundle_module, "framework_owners", lambda: ["torch"])
    monkeypatch.setattr(bundle_module.subprocess, "run", run)
    return commands


@pytest.fixture
def horovod(tmp_path: Path) -> Path:
    return make_wheel(tmp_path / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl", ["psutil", 'torch; extra == "pytorch"'])


def test_everything_that_a_host_needs(
    machine: list[list[str]], horovod: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(horovod_build, "build", lambda **_: horovod)
    folder = tmp_path / "new" / "wheels"
    assert cli.main(["bundle", str(folder)]) == 0
    listed = (folder / "requirements.txt").read_text().splitlines()
    assert sorted(listed) == sorted(
        [f"{name}=={version}" for name, (version, _) in PACKAGES.items()] + ["horovod==0.28.1", "hvd-syncbn==0.1.0"]
    )
    assert len(list(folder.glob("*.whl"))) == len(listed)
    assert f"pip install --no-index --find-links {folder} -r {folder}/requirements.txt" in capsys.readouterr().out


def test_a_package_that_is_missing_is_named(machine: list[list[str]], horovod: Path, tmp_path: Path) -> None:
    make_wheel(horovod, ["cloudpickle"])
    with pytest.raises(horovod_build.BuildError, match=r"cloudpickle is not installed, .* -m pip install cloudpickle"):
        bundle_module.bundle(tmp_path / "wheels", horovod)


def test_what_pip_says_is_passed_on(
    machine: list[list[str]], horovod: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "No matching distribution found for torch==2.13.0+cpu")

    monkeypatch.setattr(bundle_module.subprocess, "run", fail)
    monkeypatch.setattr(horovod_build, "build", lambda **_: horovod)
    assert cli.main(["bundle", str(tmp_path / "wheels")]) == 1
    assert "No matching distribution found for torch==2.13.0+cpu" in capsys.readouterr().err


@pytest.mark.parametrize("origin", ["checkout", "wheel", "index"])
def test_our_own_wheel(origin: str, machine: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "hvd_syncbn-0.1.0-cp311-cp311-linux_x86_64.whl", ["numpy"])
    checkout = tmp_path / "check out"
    checkout.mkdir()
    url = {"checkout": checkout.as_uri(), "wheel": wheel.as_uri(), "index": None}[origin]
    installed = Installed("0.1.0", [], None if url is None else {"url": url})
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: installed)
    folder = tmp_path / "wheels"
    folder.mkdir()
    assert bundle_module.our_wheel(folder) == folder / wheel.name
    asked = [command[-1] for command in machine]
    assert asked == {"checkout": [str(checkout)], "wheel": [], "index": ["hvd-syncbn==0.1.0"]}[origin]


def test_the_frameworks_packages_are_found() -> None:
    assert system.framework_owners()
    for owner in system.framework_owners():
        assert importlib.metadata.version(owner)


def test_the_wheel_dir_of_build_horovod(
    horovod: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(horovod_build, "build", lambda **_: horovod)
    folder = tmp_path / "new" / "wheels"
    assert horovod_build.main(["--no-install", "--wheel-dir", str(folder)]) == 0
    assert (folder / horovod.name).read_bytes() == horovod.read_bytes()
    assert str(folder / horovod.name) in capsys.readouterr().out
