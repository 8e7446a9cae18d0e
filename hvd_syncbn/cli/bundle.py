"""``hvd-syncbn bundle``: collects in one folder all wheels that the hosts of a cluster need."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hvd_syncbn import horovod_build
from hvd_syncbn.horovod_build.bundle import bundle

DESCRIPTION = "Collect the wheels of hvd-syncbn, Horovod, the frameworks and their requirements, for hosts without a compiler."
EPILOG = "Horovod comes from the cache or is built, as hvd-syncbn build-horovod does with the same options."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder for the wheels; created if it does not exist")
    horovod_build.add_build_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Fill the folder and return the exit status."""
    try:
        horovod_build.check_packages()
        bundle(args.folder.resolve(), horovod_build.build(mpi=args.mpi, nccl=args.nccl, install=False))
    except horovod_build.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
