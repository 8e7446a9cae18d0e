"""The command line: ``hvd-syncbn doctor | verify | bench | build-horovod``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvd_syncbn import __version__, horovod_build, verify

# A probe runs in a process of its own: a library built for something else may crash, and doctor must tell so.
_PROBE = """
import json, os
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
try:
    found = {{}}
    {body}
except BaseException as error:
    found = {{"error": f"{{type(error).__name__}}: {{error}}".partition("\\n")[0]}}
print("\\n" + json.dumps(found))
"""
_HOROVOD_PARTS = "found = {part: bool(getattr(hvd, part + '_built')()) for part in ('gloo', 'mpi', 'nccl')}"
_PROBE_TIMEOUT_S = 120


class Finding(NamedTuple):
    """One row of doctor's table, and what repairs it if it is a problem."""

    what: str
    found: str
    fix: str | None = None


def _probe(body: str) -> dict[str, object]:
    """Run Python statements that fill the dict `found` and return it; `error` is set if that failed."""
    code = _PROBE.format(body=body)
    try:
        result = subprocess.run(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_PROBE_TIMEOUT_S} s"}
    if result.returncode < 0:
        return {"error": f"crashed with {signal.Signals(-result.returncode).name}"}
    if result.returncode:
        return {"error": f"ended with exit status {result.returncode}"}
    found: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return found


def _built_with(found: dict[str, object]) -> str:
    return ", ".join(part for part in ("gloo", "mpi", "nccl") if found[part]) or "no controller"


def _package_version(name: str) -> str | None:
    return importlib.metadata.version(name) if importlib.util.find_spec(name) is not None else None


def _reinstall_command() -> str:
    checkout = Path(__file__).resolve().parents[1]
    what = f"-e {checkout}" if (checkout / "pyproject.toml").exists() else "--force-reinstall hvd-syncbn"
    return f"{sys.executable} -m pip install --no-build-isolation --no-deps {what}"


def examine() -> list[Finding]:
    """Look at everything a training job needs and return what was found."""
    frameworks = horovod_build.framework_versions()
    build_horovod = f"{sys.executable} -m hvd_syncbn.horovod_build"
    bodies = {"native core": "import hvd_syncbn.native; found['isa'] = hvd_syncbn.native.isa()"}
    for name in frameworks:
        bodies[f"{name} ops"] = f"import hvd_syncbn.{name}"
        bodies[f"Horovod for {name}"] = f"import horovod.{name} as hvd; {_HOROVOD_PARTS}"
    with ThreadPoolExecutor(max_workers=2) as pool:
        probes = dict(zip(bodies, pool.map(_probe, bodies.values()), strict=True))

    findings = [
        Finding("hvd-syncbn", __version__),
        Finding("Python", f"{platform.python_version()} ({sys.executable})"),
    ]
    for name in ("torch", "tensorflow"):
        findings.append(Finding(name, frameworks.get(name, "not installed")))
    if not frameworks:
        fix = f"{sys.executable} -m pip install torch (or tensorflow)"
        findings.append(Finding("frameworks", "neither PyTorch nor TensorFlow is installed", fix))
    keras = _package_version("keras")
    if keras is not None:
        findings.append(Finding("Keras", keras))

    for problem in horovod_build.check():
        findings.append(Finding("Horovod", problem, build_horovod))
    if importlib.util.find_spec("horovod") is not None:
        findings.append(Finding("Horovod", _package_version("horovod") or "unknown"))
        for name in frameworks:
            found = probes[f"Horovod for {name}"]
            if "error" in found:
                findings.append(Finding(f"Horovod for {name}", str(found["error"]), build_horovod))
            else:
                findings.append(Finding(f"Horovod for {name}", f"built with {_built_with(found)}"))

    core = probes["native core"]
    if "error" in core:
        findings.append(Finding("native core", str(core["error"]), _reinstall_command()))
    else:
        findings.append(Finding("native core", f"loads, instruction set {core['isa']}"))
    for name in frameworks:
        found = probes[f"{name} ops"]
        if "error" in found:
            findings.append(Finding(f"{name} ops", str(found["error"]), _reinstall_command()))
        else:
            findings.append(Finding(f"{name} ops", "load"))

    return findings + _advice()


def _advice() -> list[Finding]:
    """What makes a job faster, from what `hvd-syncbn bench` measures. Nobody's settings are changed."""
    cycle = os.environ.get("HOROVOD_CYCLE_TIME")
    advice = "a layer's packet waits up to one cycle; HOROVOD_CYCLE_TIME=0.1 takes up to a third off it where cores are idle"
    findings = [Finding("HOROVOD_CYCLE_TIME", f"{cycle} ms" if cycle else f"1 ms, the default: {advice}")]
    if os.environ.get("HOROVOD_CACHE_CAPACITY") == "0":
        findings.append(Finding("HOROVOD_CACHE_CAPACITY", "0: the ranks agree anew on every packet; better left alone"))
    return findings


def doctor() -> int:
    """Print what was found and how to repair what is wrong; return 1 if something is."""
    console = Console(highlight=False)
    with console.status("Looking at the frameworks, Horovod and the native parts"):
        findings = examine()
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row("[red]✗[/]" if finding.fix else "[green]✓[/]", finding.what, Text(finding.found))
    console.print(table)
    # Horovod missing and built for another version have one remedy: say each once.
    fixes = list(dict.fromkeys(finding.fix for finding in findings if finding.fix))
    if fixes:
        console.print("\nTo repair:")
        for fix in fixes:
            console.print(f"  {fix}", markup=False, soft_wrap=True)
    return 1 if fixes else 0


def bench(quick: bool) -> int:
    """Run the benchmarks of the source checkout that this is installed from; they are no part of a wheel."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "__main__.py").exists():
        print("The benchmarks are in the source checkout only: run `make bench` there.", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "benchmarks", *["--quick"] * quick]
    return subprocess.run(command, cwd=checkout, check=False).returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hvd-syncbn", description="Synchronized batch normalization for Horovod.")
    parser.add_argument("--version", action="version", version=f"hvd-syncbn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    text = "Look at the installation and say how to repair what is wrong."
    command = commands.add_parser("doctor", help=text, description=text)
    command.set_defaults(run=lambda _args: doctor())

    text = "Run one training step in every framework and layout that is here, and tell whether the bits are equal."
    command = commands.add_parser("verify", help=text, description=text)
    command.set_defaults(run=lambda _args: verify.verify())

    text = "Measure speed, latency, overheads and accuracy beside every other batch norm; some 10 minutes."
    command = commands.add_parser("bench", help=text, description=text)
    command.add_argument("--quick", action="store_true", help="2 ranks, fewer shapes and rounds: about a minute")
    command.set_defaults(run=lambda args: bench(args.quick))

    text = horovod_build.DESCRIPTION
    command = commands.add_parser("build-horovod", help=text, description=text, epilog=horovod_build.EPILOG)
    horovod_build.add_arguments(command)
    command.set_defaults(run=horovod_build.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = _parser().parse_args(argv)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
