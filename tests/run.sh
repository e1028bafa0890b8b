#!/usr/bin/env bash
# Every test that this machine can run: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
bash tools/install.sh "${PYTHON:-python3}" "$venv"
export OMP_NUM_THREADS=1 PATH="$PWD/$venv/bin:$PATH"
exec python -m pytest "$@"
