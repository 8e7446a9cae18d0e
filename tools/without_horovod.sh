#!/bin/bash
# Installs the package beside PyTorch alone, in a new environment, and runs what works without Horovod and TensorFlow:
#   tools/without_horovod.sh FOLDER
# Takes some 5 minutes and 1.5 GB in FOLDER; not in CI, which hides Horovod instead (tests/parallel/test_cli.py).
set -euo pipefail
folder=$(realpath -m "$1")
root=$(realpath "$(dirname "$0")/..")
python=$folder/venv/bin/python
mkdir -p "$folder"

[ -x "$python" ] || python3.11 -m venv "$folder/venv"
"$python" -m pip install -q "$(grep '^torch==' "$root/requirements.txt")"
"$python" -m pip install -q scikit-build-core cmake ninja setuptools wheel packaging rich
rm -rf "$folder/source"
mkdir -p "$folder/source"
git -C "$root" archive HEAD | tar -x -C "$folder/source"
cd "$folder/source"
"$python" -m pip install -q --no-build-isolation .
rm -rf hvd_syncbn torch_impl tf_impl # so that nothing but the installed package can be imported
if "$python" -c "import horovod" 2>/dev/null || "$python" -c "import tensorflow" 2>/dev/null; then
  echo "Horovod or TensorFlow is installed in $folder/venv: choose another folder" >&2
  exit 1
fi

export OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
hvd-syncbn doctor
hvd-syncbn doctor --launcher torchrun -np 2
hvd-syncbn verify
hvd-syncbn verify --launcher torchrun -np 2
hvd-syncbn verify --launcher all
torchrun --nproc-per-node 2 examples/torchrun/with_ddp.py
