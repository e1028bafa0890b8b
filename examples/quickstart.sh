#!/usr/bin/env bash
# From a fresh clone to a model that Group Fine-Tuning has improved, on two CPU cores, in a few minutes:
#
#   bash examples/quickstart.sh [--seed N] [--run-dir DIR] [flags for both training commands]
#
# The task is countdown: `3,5,8=7:` wants an expression of the three digits that gives 7. A model of 0.4M parameters is
# warmed up on mixed answers (SFT), then trained by GFT on groups of 1 expert, 3 teacher and 4 own answers, on two ranks
# under tensor parallelism. `--pipeline-model-parallel-size 2` puts the two ranks in a pipeline instead.
# ROLLOUT_ENGINE=sglang has the own answers drawn by a real SGLang server on the CPU (another environment, 1.8 GB).
set -euo pipefail
cd "$(dirname "$0")/.."

seed=1
run_dir=
layout=(--tensor-model-parallel-size 2)
passed_on=()
while [ $# -gt 0 ]; do
    case $1 in
        --seed) seed=$2 && shift 2 ;;
        --run-dir) run_dir=$2 && shift 2 ;;
        --tensor-model-parallel-size | --pipeline-model-parallel-size | --context-parallel-size)
            layout=("$1" "$2") && shift 2 ;;
        *) passed_on+=("$1") && shift ;;
    esac
done
run_dir=${run_dir:-runs/quickstart-seed$seed}
mkdir -p "$run_dir"

started=$SECONDS
bash tools/install.sh "${PYTHON:-python3}" .venv
engine=()
case ${ROLLOUT_ENGINE:-local} in
    local) ;;
    sglang)
        bash tools/sglang_cpu.sh .venv-sglang
        engine=(--rollout-engine sglang --sglang-workers-per-node 1 --sglang-python .venv-sglang/bin/python)
        ;;
    *)
        echo "error: ROLLOUT_ENGINE is $ROLLOUT_ENGINE; it has to be local or sglang" >&2
        exit 2
        ;;
esac
installed=$SECONDS
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"

if [ ! -e "$run_dir/tiny-model/config.json" ]; then
    python tools/prepare_data.py countdown --output-dir "$run_dir/data" --seed "$seed"
    python tools/make_tiny_model.py --output "$run_dir/tiny-model" --seed "$seed" \
        --characters '0123456789+-*=,:' --hidden-size 96 --num-layers 4 --intermediate-size 256 --max-position-embeddings 32
fi

COMMON_ARGS=(
    "${layout[@]}"
    --make-vocab-size-divisible-by 4
    --seq-length 32
    --rollout-max-response-len 6
    --max-tokens-per-gpu 2048
    --rm-type examples/countdown_reward.py:score
    --seed "$seed"
    --log-interval 25
)
WARMUP_ARGS=(
    --hf-checkpoint "$run_dir/tiny-model"
    --hf-export "$run_dir/warmup/hf"
    --run-dir "$run_dir/warmup"
    --prompt-data "$run_dir/data/warmup.jsonl"
    --loss sft --n-expert 1 --n-teacher 1 --n-self 0
    --rollout-batch-size 640 --num-steps-per-rollout 10
    --train-iters 900 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20 --adam-beta2 0.95
    --eval-interval 0 --save-interval 0
)
GFT_ARGS=(
    --hf-checkpoint "$run_dir/warmup/hf"
    --hf-export "$run_dir/hf"
    --run-dir "$run_dir"
    --prompt-data "$run_dir/data/train.jsonl"
    --eval-prompt-data "$run_dir/data/test.jsonl"
    --loss gft --tau 0.7 --tau-self 0 --n-expert 1 --n-teacher 3 --n-self 4
    --rollout-batch-size 16
    --train-iters 200 --lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 10 --adam-beta2 0.95
    --eval-interval 50 --save-interval 100
)

port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
train() {
    torchrun --nproc-per-node 2 --master-addr 127.0.0.1 --master-port "$(port)" examples/pretrain_gft.py "$@"
}

echo "== warm-up: supervised fine-tuning"
[ -e "$run_dir/warmup/hf/config.json" ] || train "${COMMON_ARGS[@]}" "${WARMUP_ARGS[@]}" "${passed_on[@]}"
echo "== Group Fine-Tuning"
train "${COMMON_ARGS[@]}" "${GFT_ARGS[@]}" "${engine[@]}" "${passed_on[@]}"
finished=$SECONDS

echo "== held-out accuracy before and after GFT (mean of 8 samples a problem)"
python tools/report.py "$run_dir" --summary "$run_dir/summary.json" \
    --set install_seconds=$((installed - started)) train_seconds=$((finished - installed))
