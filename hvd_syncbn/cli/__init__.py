"""The command line: ``hvd-syncbn doctor | verify | bench | build-horovod | bundle``, one module per command.

Other modules: ``job.py`` starts ``rank.py`` on the ranks of a launcher, for ``verify`` and ``doctor``, with one of
``engines.py``; ``verify`` runs ``stacks.py``; ``doctor`` predicts costs with ``cost_model.py`` and ``networks.py``.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from hvd_syncbn import __version__
from hvd_syncbn.cli import bench, build_horovod, bundle, doctor, verify

_COMMANDS = {
    "doctor": doctor,
    "verify": verify,
    "bench": bench,
    "build-horovod": build_horovod,
    "bundle": bundle,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hvd-syncbn", description="Synchronized batch normalization for Horovod.")
    parser.add_argument("--version", action="version", version=f"hvd-syncbn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, module in _COMMANDS.items():
        text = module.DESCRIPTION
        command = commands.add_parser(name, help=text, description=text, epilog=getattr(module, "EPILOG", None))
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""

    def stop(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    args = _parser().parse_args(argv)
    # Signals raise an exception, so that commands end the processes they have started.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, stop)
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    return status
