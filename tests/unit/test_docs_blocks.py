"""Every Python block of README and docs runs or says why not, and every command there exists. See blocks.py."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hvd_syncbn import cli
from tests.needs import need
from tests.unit.blocks import ROOT, Block, blocks

pytestmark = pytest.mark.slow

LIMIT = 120
BLOCKS = blocks()
MESSAGES = ("hvd-syncbn was built", "hvd-syncbn does not")  # no commands
OWN = {"train.py", "job.py"}  # a reader's scripts


@cache
def outcomes(framework: str) -> dict[int, str | None]:
    """Number of the block -> what it raised, of all that run in this framework's process."""
    need(framework, {"torch": "horovod.torch", "keras": "horovod.tensorflow"}[framework])
    # Every block is a job of its own, and MPI, where Horovod has it, cannot be started twice in a process.
    environment = os.environ | {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}
    command = [sys.executable, "-m", "tests.unit.blocks", framework]
    process = subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    found = [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"number"')]
    return {one["number"]: one["error"] for one in found}


@pytest.mark.parametrize("number", [n for n, block in enumerate(BLOCKS) if not block.reason], ids=lambda n: BLOCKS[n].name)
def test_block(number: int) -> None:
    block = BLOCKS[number]
    if "hvd_syncbn.torch" in block.source:  # in Keras's process, too: layers are exchanged
        need("torch")
    error = outcomes(block.framework or "torch")[number]
    if block.raises:
        assert error is not None and re.search(rf"^{block.raises}: ", error, re.MULTILINE), error
    else:
        assert error is None, f"{block.name}\n{error}"


def test_hardly_any_block_is_not_run() -> None:
    left_out = [block.name for block in BLOCKS if block.reason]
    assert len(left_out) <= 4 and len(BLOCKS) - len(left_out) >= 24, left_out


def test_marks_are_seen() -> None:
    """A mark that stands elsewhere than above a block would say nothing."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    marks = sum(page.read_text().count("<!-- block: ") for page in pages)
    assert marks == sum(bool(re.search(r"<!-- block: ", above(block))) for block in BLOCKS) > 10


def above(block: Block) -> str:
    page = ROOT / block.page if block.page == "README.md" else ROOT / "docs" / block.page
    return "\n".join(page.read_text().splitlines()[block.line - 3 : block.line - 1])


def commands() -> list[tuple[str, str]]:
    """(page, command): lines of blocks without a language, and code within the text."""
    found = []
    for page in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        fenced = re.findall(r"^ *```\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
        text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
        lines = [line.strip() for block in fenced for line in block.splitlines()]
        commands = [line for line in [*lines, *spans] if re.match(r"(make|hvd-syncbn|horovodrun|python3?) ", line)]
        found += [(page.name, command) for command in commands if not command.startswith(MESSAGES)]
    return found


def complaint(command: str) -> str | None:
    """What is wrong with a command, without running it."""
    words = shlex.split(re.sub(r"[][]", "", command), comments=True)
    words = [{"N": "2", "hosts": "h1:2", "HOSTS": "h1:2"}.get(word, word) for word in words]
    program, arguments = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
        return None if set(arguments) <= set(targets) else f"targets are {targets}"
    if program == "hvd-syncbn":
        return parsed(lambda: cli._parser().parse_args(arguments))[1]
    if program == "horovodrun":
        from horovod.runner import launch

        if all(word.startswith("--") for word in arguments):  # no command, but options by their names
            unknown = [word for word in arguments if f"'{word}'" not in inspect.getsource(launch)]
            return f"does not know {unknown}" if unknown else None
        if "python" not in arguments:
            arguments += ["python", "train.py"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["horovodrun", *arguments])
            options, problem = parsed(launch.parse_args)
        return problem or complaint(shlex.join(options.command))
    if arguments[0] == "-m":
        spec = importlib.util.find_spec(arguments[1])
        if spec is None:
            return "no such module"
        folders = spec.submodule_search_locations or []
        sources = [Path(folder) / "__main__.py" for folder in folders] or [Path(str(spec.origin))]
        given = arguments[2:]
    elif arguments[0] in OWN:
        return None
    else:
        sources = [path for path in (ROOT / arguments[0], *ROOT.glob(f"examples/*/{arguments[0]}")) if path.exists()]
        given = arguments[1:]
    if not sources:
        return "no such file"
    unknown = [word for word in given if word.startswith("-") and f'"{word}"' not in sources[0].read_text()]
    return f"{sources[0].name} does not know {unknown}" if unknown else None


def parsed(parse: Callable[[], argparse.Namespace]) -> tuple[Any, str | None]:
    """What argparse makes of it, and its complaint."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return parse(), None
        except SystemExit:
            return None, said.getvalue().splitlines()[-1]


def test_every_command_exists() -> None:
    found = commands()
    assert len(found) > 60
    wrong = [f"{page}: `{command}`: {problem}" for page, command in found if (problem := complaint(command))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "command",
    [
        "make tests",
        "hvd-syncbn verify --np 2",
        "hvd-syncbn docter",
        "horovodrun -np 2 --hostfiles x python train.py",
        "horovodrun -np 2 python train_tensorflow.py",
        "python -m benchmarks.memory",
        "python train_pytorch.py --mixed",
    ],
)
def test_a_wrong_command_is_seen(command: str) -> None:
    assert complaint(command)
