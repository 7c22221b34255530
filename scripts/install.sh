#!/usr/bin/env bash
# Make a virtual environment in .venv (or $MOETEL_VENV) and install Moetel into it, editable.
#   scripts/install.sh EXTRAS        for example: scripts/install.sh torch,eval
# On Linux without an NVIDIA GPU, torch is installed from a CPU build, so that no CUDA packages are pulled.
# MOETEL_TORCH=cpu or cuda says which build it is; MOETEL_EDITABLE=0 installs a copy that needs no clone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-all,dev}"
venv="${MOETEL_VENV:-.venv}"
build="${MOETEL_TORCH:-auto}"
if [ "$build" = auto ]; then
  if [ "$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then build=cuda; else build=cpu; fi
fi
case "$build" in cpu | cuda) ;; *)
  echo "error: MOETEL_TORCH is '$build'; give cpu, cuda or auto" >&2
  exit 1
  ;;
esac
editable=-e
if [ "${MOETEL_EDITABLE:-1}" = 0 ]; then editable=; fi

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or 3.12 (with venv) was not found; install it, or name it: PYTHON=/path/to/python $0" >&2
  exit 1
}

# Whether pip finds a torch of the pinned version that needs no CUDA packages where it looks without a network.
install_torch() {
  local pinned
  pinned="$(grep -E '^torch==' constraints.txt)"
  if "$venv/bin/python" -c 'import torch' 2>/dev/null; then return; fi
  if [ "$build" = cuda ]; then
    "$venv/bin/python" -m pip install -q "$pinned" -c constraints.txt
    return
  fi
  # A wheel that lies on this machine (pip's find-links) comes first, then PyTorch's index of CPU builds.
  "$venv/bin/python" -m pip install -q --no-index --no-deps "$pinned" 2>/dev/null ||
    "$venv/bin/python" -m pip install -q --no-deps --index-url https://download.pytorch.org/whl/cpu "$pinned"
}

if [ ! -x "$venv/bin/python" ]; then
  python="$(find_python)"
  echo "making $venv with $("$python" --version)" >&2
  "$python" -m venv "$venv"
fi
case ",$extras," in *,torch,* | *,all,*) install_torch ;; esac
echo "installing moetel[$extras] into $venv" >&2
"$venv/bin/python" -m pip install -q $editable ".[$extras]" -c constraints.txt
