#!/usr/bin/env bash
# On a machine with a GPU: compile for it, check every CUDA operator against the reference, print the bench.
#     [PYTHON=...] bash tests/gpu/run.sh [FOLDER]
# PYTHON has a CUDA build of torch, and setuptools, ninja, pytest, numpy, tyro, pyyaml and rich; nvcc is found as
# setup.py finds it. FOLDER (build/gpu) gets bench.json and bench.md. Without a GPU nothing is done.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
folder=${1:-build/gpu}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "skipped: $python sees no GPU (or has no CUDA build of torch)"
    exit 0
fi
if ! "$python" -c 'import numpy, pytest, rich, setuptools, tyro, yaml'; then  # now, not after minutes of compiling
    echo "error: a package is missing; $python -m pip install setuptools ninja pytest numpy tyro pyyaml rich" >&2
    exit 1
fi
mkdir -p "$folder"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" GFT_MEGATRON_CUDA=1
"$python" -c 'import torch; print("GPU:", torch.cuda.get_device_name(), "torch", torch.__version__)'
if ! "$python" setup.py build_ext --inplace >"$folder/build.log" 2>&1; then
    tail -n 20 "$folder/build.log" >&2
    echo "error: the build failed; the whole log is in $folder/build.log" >&2
    exit 1
fi
"$python" -m pytest -q tests/gpu
"$python" tools/bench_loss.py --device cuda --dtype bf16 --vocab-size 151936 --num-tokens 8192 \
    --tensor-parallel 1 --json "$folder/bench.json" --markdown "$folder/bench.md"
