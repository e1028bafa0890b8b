#!/usr/bin/env bash
# Compare SFT, DFT, GFT, GRPO and others on the countdown task, on two CPU cores:
#
#   bash examples/compare_methods.sh [--seeds N] [--run-dir DIR] [--steps N]
#
# Prints a table with standard errors and what may be concluded from it; a figure and results.json are in the folder.
# About 40 minutes for three seeds. Stopped and started again with the same folder, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install.sh "${PYTHON:-python3}" .venv
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"
exec python tools/compare_methods.py "$@"
