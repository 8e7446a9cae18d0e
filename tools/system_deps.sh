#!/bin/sh
# Makes sure of what pip cannot install: a Python with venv and headers, a C++ compiler, and patch. Installs them with
# apt-get where that is possible without asking, else prints the command and stops. Then makes the environment in $1.
set -eu
venv=$1

find_python() {
  for python in python3.11 python3; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
}

python_has() { [ -n "$python" ] && "$python" -c "$1" >/dev/null 2>&1; }

look() {
  missing=
  python=$(find_python)
  python_has 'import ensurepip, venv' || missing="$missing python3 python3-venv"
  python_has 'import os, sysconfig
open(os.path.join(sysconfig.get_path("include"), "Python.h"))' || missing="$missing python3-dev"
  command -v c++ >/dev/null || missing="$missing g++"
  command -v patch >/dev/null || missing="$missing patch"
}

look
if [ -n "$missing" ]; then
  command="apt-get install -y --no-install-recommends$missing"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Missing from the system:$missing. Installing: $command"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $command
    look
  fi
  if [ -n "$missing" ]; then
    echo "Missing from the system:$missing. Install them, then run make again:" >&2
    echo "  sudo $command" >&2
    exit 1
  fi
fi

"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
