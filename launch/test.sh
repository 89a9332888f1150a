#!/usr/bin/env bash
# Check the project: style, types, tests. Further arguments go to pytest, e.g. `bash launch/test.sh -m slow`; without any,
# the tests run in two halves side by side.
# With -m mutations: only whether the tests notice mistakes that are put into a copy of the package, about 7 minutes.
# With --faults: only the tests that kill ranks, fill disks and cut off hosts, which take about 15 minutes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

if [ "${1:-}" = --faults ]; then
    shift
    exec pytest -m faults -rs "$@"
fi

ruff check
ruff format --check
mypy
if [ $# -eq 0 ]; then
    exec python tests/side_by_side.py
fi
pytest "$@"
