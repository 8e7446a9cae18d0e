"""``hvd-syncbn bench``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

DESCRIPTION = "Compare speed, latency, overhead and accuracy with other batch norm layers; takes about 10 minutes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--quick", action="store_true", help="2 ranks, fewer shapes and rounds: about a minute")


def run(args: argparse.Namespace) -> int:
    """Run the benchmarks of the source checkout that this package is installed from; wheels do not contain them."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "__main__.py").exists():
        print("The benchmarks are only in the source checkout. Clone it and run `make bench` there.", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "benchmarks", *["--quick"] * args.quick]
    return subprocess.run(command, cwd=checkout, check=False).returncode
