#!/usr/bin/env bash
# Install everything and run what CI runs: formatting, lint, types, tests (the slow ones too), the files of tests spread
# over the processors. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh all,dev
bin="${MOETEL_VENV:-.venv}/bin"
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
exec "$bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
