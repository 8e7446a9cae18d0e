#!/bin/bash
# Makes the bundle of wheels, installs it into a fresh environment whose PATH has no compiler and whose pip has no index, and
# runs `hvd-syncbn verify` on two ranks of each framework there. Takes minutes: with both frameworks the bundle has 1 GB.
#
#   nice tools/try_bundle.sh [PYTHON]       default: .venv/bin/python, as `make setup` leaves it
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
work=$(mktemp -d "${TMPDIR:-/tmp}/try-bundle-XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONSAFEPATH=1

echo "== the bundle"
"$python" -m hvd_syncbn.cli bundle wheels

echo "== a host without a compiler"
"$python" -m venv env
mkdir bin
for tool in sh env; do ln -s "$(command -v $tool)" bin/; done
on_host() { env -i PATH="$work/env/bin:$work/bin" HOME="$work" PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 "$@"; }
for compiler in cc gcc c++ g++ clang cmake ninja make; do
  if on_host sh -c "command -v $compiler"; then exit 1; fi
done
on_host python -m pip install --quiet --no-index --find-links wheels -r wheels/requirements.txt
on_host hvd-syncbn verify
on_host hvd-syncbn verify -np 2
