#!/usr/bin/env bash
# Every test that this machine can run: bash tests/run.sh [pytest arguments]
# Two processes share the tests; most of those in tests/unit keep only one core busy.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
bash tools/install.sh "${PYTHON:-python3}" "$venv"
export OMP_NUM_THREADS=1 PATH="$PWD/$venv/bin:$PATH"
exec python -m pytest -n 2 --no-loadscope-reorder --durations 25 --durations-min 5 "$@"
