"""The changes to Horovod: the files of ``patches/``, applied in the order of their names by the tool ``patch``.

A patch begins with three fields, `Subject`, `Why` and `Upstream` (Horovod's issue or pull request, or ``none known``).
Continuation lines begin with a space. An empty line and a unified diff follow. docs/horovod_patches.md lists all patches.
"""

from __future__ import annotations

import email
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("patches")


class BuildError(Exception):
    """Horovod cannot be built; the message says why and what to do."""


@dataclass(frozen=True)
class Patch:
    """One patch: the file's name, the fields of its header, and the diff."""

    name: str
    subject: str
    why: str
    upstream: str
    diff: str


def parse(name: str, text: str) -> Patch:
    """Parse the text of a patch file.

    Raises:
        ValueError: A field or the diff is missing.
    """
    message = email.message_from_string(text)
    subject, why, upstream = (" ".join(str(message.get(field, "")).split()) for field in ("Subject", "Why", "Upstream"))
    diff = str(message.get_payload())
    parts = {"Subject": subject, "Why": why, "Upstream": upstream, "diff": diff.startswith("--- a/")}
    missing = ", ".join(part for part, found in parts.items() if not found)
    if missing:
        raise ValueError(f"{name}: expected Subject, Why, Upstream, an empty line and a diff. Received: no {missing}")
    return Patch(name, subject, why, upstream, diff)


def patches() -> tuple[Patch, ...]:
    """Return all patches in the order in which they are applied.

    Raises:
        BuildError: There are no patches.
    """
    found = tuple(parse(path.name, path.read_text()) for path in sorted(FOLDER.glob("*.patch")))
    if not found:
        raise BuildError(f"The patches of Horovod are missing. Reinstall hvd-syncbn. Searched: {FOLDER}.")
    return found


def apply(source: Path, patches: Sequence[Patch]) -> None:
    """Apply patches to the source tree.

    Raises:
        BuildError: A patch does not apply.
    """
    for each in patches:
        # No fuzz: the lines around a change must match exactly.
        command = ["patch", "--strip=1", "--fuzz=0", "--batch", "--forward", "--no-backup-if-mismatch", "--reject-file=-"]
        result = subprocess.run(command, cwd=source, input=each.diff, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BuildError(f"{each.name} does not apply to Horovod's source at {source}:\n{result.stdout}{result.stderr}")
