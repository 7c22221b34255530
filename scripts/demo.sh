#!/usr/bin/env bash
# The main job on a fresh machine: install, build a store from the tenants in examples/, answer prompts for each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh torch,jax,eval,serve
exec "${MOETEL_VENV:-.venv}/bin/python" -m scripts.demo "$@"
