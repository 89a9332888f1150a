#!/usr/bin/env bash
# Check the project: style, types, tests. Further arguments go to pytest, e.g. `bash launch/test.sh -m slow`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

ruff check
ruff format --check
mypy
pytest "$@"
