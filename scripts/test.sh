#!/usr/bin/env bash
# Install everything, then formatting, lint, types and tests, the files of tests spread over the processors.
# Arguments go to pytest: -m 'slow or not slow' adds the slow tests, as CI does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh "${MOETEL_EXTRAS:-all,dev}"
bin="${MOETEL_VENV:-.venv}/bin"
"$bin/ruff" format --check .
"$bin/ruff" check .
# Types are checked beside the tests, which leave processors idle at times.
types="$(mktemp)"
trap 'rm -f "$types"' EXIT
"$bin/mypy" >"$types" 2>&1 &
failed=0
"$bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@" || failed=$?
if ! wait $!; then
  cat "$types" >&2
  failed=1
fi
exit "$failed"
