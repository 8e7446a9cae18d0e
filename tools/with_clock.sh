#!/bin/sh
# Runs a quiet command and says every 15 seconds that it still runs.
set -u
(
  seconds=0
  # A last sleep outlives us; it must not hold open a pipe that we write to.
  while sleep 15 >/dev/null 2>&1; do
    seconds=$((seconds + 15))
    echo "  ... $seconds s"
  done
) &
clock=$!
trap 'kill $clock 2>/dev/null' EXIT
"$@"
