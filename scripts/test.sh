#!/usr/bin/env bash
# Install everything, then formatting, lint, types and tests, the files of tests spread over the processors.
# Arguments go to pytest: -m 'slow or not slow' adds the slow tests, as CI does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh "${MOETEL_EXTRAS:-all,dev}"
bin="${MOETEL_VENV:-.venv}/bin"
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
exec "$bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
