"""Runs the benchmarks: `python -m benchmarks [--quick]`. Tables on the screen, figures in benchmarks/results/."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import layer
from hvd_syncbn import native

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs everything and saves it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions, about a minute")
    args = parser.parse_args()
    console = Console()
    rows = layer.measure(args.quick, console)
    console.print(layer.table(rows))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "layer.json"
    about = {"machine": platform.processor() or platform.machine(), "isa": native.isa(), "torch": torch.__version__}
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    console.print(f"Figures: {path}")


if __name__ == "__main__":
    main()
