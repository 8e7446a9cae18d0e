"""Collects all wheels that a host needs in one folder, so that only one machine needs a compiler: ``hvd-syncbn bundle``."""

from __future__ import annotations

import email
import importlib.metadata
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import unquote, urlparse

from hvd_syncbn.horovod_build.patching import BuildError
from hvd_syncbn.horovod_build.system import framework_owners

REQUIREMENTS = "requirements.txt"


def requirements_of(wheel: Path) -> list[str]:
    """Return the requirements of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []


def pins(requirements: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of all packages that the requirements need, directly or indirectly, on this machine.

    Raises:
        BuildError: A package is not installed.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    left = [(Requirement(text), "") for text in requirements]
    while left:
        requirement, extra = left.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise BuildError(
                f"{name} is not installed, and a package of the bundle requires it. "
                f"Install it: {sys.executable} -m pip install {name}"
            ) from None
        found[name] = distribution.version
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                left += [(Requirement(text), wanted) for text in distribution.requires or ()]
    return found


def our_wheel(folder: Path) -> Path:
    """Put the wheel of hvd-syncbn into a folder, built or copied from the source that it was installed from.

    Raises:
        BuildError: The wheel cannot be built.
    """
    distribution = importlib.metadata.distribution("hvd-syncbn")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    url = urlparse(origin.get("url", ""))
    source = Path(unquote(url.path))
    if url.scheme == "file" and source.exists():
        if source.suffix == ".whl":
            return Path(shutil.copy(source, folder))
        _pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(source))
    else:
        _pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), f"hvd-syncbn=={distribution.version}")
    return next(folder.glob(f"hvd_syncbn-{distribution.version}-*.whl"))


def bundle(folder: Path, horovod: Path, report: Callable[[str], None] = print) -> None:
    """Fill a folder with the wheels of hvd-syncbn, Horovod, the frameworks and their requirements, and a list of them.

    Args:
        folder: Created if it does not exist.
        horovod: Horovod's wheel.
        report: Called with a line for each step.

    Raises:
        BuildError: A wheel cannot be built or downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    built = [Path(shutil.copy(horovod, folder))]
    report("Building the wheel of hvd-syncbn")
    built.append(our_wheel(folder))
    owners = framework_owners()
    needed = pins([*owners, *(text for wheel in built for text in requirements_of(wheel))])
    report(f"Collecting {len(needed)} more wheels at their installed versions")
    listed = [f"{name}=={version}" for name, version in sorted(needed.items())]
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), *listed)
    for wheel in built:
        name, version = wheel.name.split("-")[:2]
        listed.append(f"{name.replace('_', '-')}=={version}")
    (folder / REQUIREMENTS).write_text("".join(f"{line}\n" for line in listed))
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    report(f"{len(listed)} wheels, {size / 2**20:.0f} MiB. Run on each host, with this version of Python:")
    report(f"  python3 -m pip install --no-index --find-links {folder} -r {folder / REQUIREMENTS}")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        said = "\n".join((result.stderr or result.stdout).strip().splitlines()[-10:])
        raise BuildError(f"pip could not build the wheels of the bundle:\n{said}")
