#!/usr/bin/env bash
# Group Fine-Tuning of Qwen2.5-0.5B on GSM8K, on one GPU.
#
#   pip install datasets
#   python tools/prepare_data.py gsm8k --hub --output data/gsm8k/train.jsonl
#   python tools/prepare_data.py gsm8k --hub --split test --output data/gsm8k/test.jsonl
#   hf download Qwen/Qwen2.5-0.5B --local-dir models/Qwen2.5-0.5B
#   bash examples/qwen2.5-0.5b-gsm8k.sh [more flags, which win over those below]
#
# HF_CHECKPOINT, DATA_DIR and RUN_DIR name other places. Started again, it goes on from its newest checkpoint.
#
# We have not run this recipe on a GPU: its flags are tested, its settings and its need of memory (meant for 24 GB) are
# not. GSM8K has one recorded solution a problem, so a group is 1 expert and 7 own answers.
set -euo pipefail
cd "$(dirname "$0")/.."

HF_CHECKPOINT=${HF_CHECKPOINT:-models/Qwen2.5-0.5B}
DATA_DIR=${DATA_DIR:-data/gsm8k}
RUN_DIR=${RUN_DIR:-runs/qwen2.5-0.5b-gsm8k}

MODEL_ARGS=(
    --hf-checkpoint "$HF_CHECKPOINT"
    --hf-export "$RUN_DIR/hf"
    --bf16
)
DATA_ARGS=(
    --prompt-data "$DATA_DIR/train.jsonl"
    --eval-prompt-data "$DATA_DIR/test.jsonl"
    --seq-length 1024
    --max-prompt-length 512
)
ROLLOUT_ARGS=(
    --rollout-batch-size 64
    --n-expert 1
    --n-teacher 0
    --n-self 7
    --rollout-max-response-len 512
    --rollout-temperature 1.0
    --rm-type math
)
LOSS_ARGS=(
    --loss gft
    --tau 0.7
)
OPTIMIZER_ARGS=(
    --train-iters 234 # two epochs: 7,473 problems, 64 a step
    --lr 1e-6
    --lr-decay-style constant
    --lr-warmup-iters 10
    --weight-decay 0.01
    --clip-grad 1.0
    --max-tokens-per-gpu 8192
    --seed 1234
)
OUTPUT_ARGS=(
    --run-dir "$RUN_DIR"
    --eval-interval 39
    --n-samples-per-eval-prompt 4
    --save-interval 39
    --keep-last 2
)

torchrun --standalone --nproc-per-node 1 examples/pretrain_gft.py \
    "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${LOSS_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" "$@"
