#!/bin/bash
# Builds Horovod and the package for versions of Python and the frameworks, and runs `hvd-syncbn verify -np 2` and tests/unit there.
#
#   nice tools/try_versions.sh ROW...      ROW: PYTHON:TORCH:TENSORFLOW[:KERAS], "-" for none
#   nice tools/try_versions.sh 3.11:-:2.16.2 3.12:2.13.0:2.21.0
#
# Takes 5 to 15 minutes a row. Prints one line of docs/versions.md's table for each; all that was said is in out/versions/.
# What is tried is the last commit, in a clone and environments outside the checkout (removed at the end); see try_wheel.sh.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=$PWD/out/versions
mkdir -p "$out"
work=$(mktemp -d "${TMPDIR:-/tmp}/try-versions-XXXXXX")
trap 'rm -rf "$work"' EXIT
git clone -q . "$work/source"
cd "$work/source" || exit 1
tools=$(sed -nE 's/^([a-z_-]+)==.*/\1/p' requirements.txt | grep -vE '^(torch|tensorflow-cpu|keras|clang-format|ruff|onnx.*)$')

try() { # one row: its environment, Horovod, the package's own word, its tests
  local python=$1 torch=$2 tensorflow=$3 keras=${4:--} env=$work/env packages=()
  [ "$torch" = - ] || packages+=("torch==$torch")
  [ "$tensorflow" = - ] || packages+=("tensorflow-cpu==$tensorflow")
  [ "$keras" = - ] || packages+=("keras==$keras")
  rm -rf "$env"
  "python$python" -m venv "$env" || return
  # shellcheck disable=SC2086 # names, one a word
  "$env/bin/python" -m pip install -qq --disable-pip-version-check "${packages[@]}" $tools || return
  "$env/bin/python" -c "import sys; print('python', sys.version.split()[0])"
  "$env/bin/python" -m pip list --disable-pip-version-check 2> /dev/null | grep -E '^(torch|tensorflow.cpu|keras|numpy|cmake) '
  "$env/bin/python" -m hvd_syncbn.horovod_build || return
  echo "== Horovod is built"
  tools/try_wheel.sh "$env/bin/python" tests/unit -q
}

version() { awk -v name="$1" '$1 ~ "^" name "$" && !found {found = $2} END {print found ? found : "-"}' "$2"; }

echo "| Python | PyTorch | TensorFlow, Keras | numpy | Horovod, package | verify | tests/unit | seen |"
echo "|---|---|---|---|---|---|---|---|"
for row in "$@"; do
  log=$out/$row.log
  IFS=: read -ra fields <<< "$row"
  try "${fields[@]}" > "$log" 2>&1
  built=no && grep -q "^== Horovod is built" "$log" && built=Horovod && grep -q "^== its tests" "$log" && built=yes
  verified=no && grep -q "^EQUAL: .* one sha256" "$log" && verified=yes
  tested=$(grep -oE "([0-9]+ (passed|failed|skipped|errors?)(, )?)+" "$log" | tail -1 | sed 's/, $//')
  echo "| $(version python "$log") | $(version torch "$log") | $(version tensorflow.cpu "$log"), $(version keras "$log") |" \
    "$(version numpy "$log") | $built | $verified | ${tested:-not run} | $(date +%F) |"
done
