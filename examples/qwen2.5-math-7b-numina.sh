#!/usr/bin/env bash
# Group Fine-Tuning of Qwen2.5-Math-7B on NuminaMath-CoT, on 8 GPUs of 80 GB: tensor parallel 2, data parallel 4.
#
#   pip install datasets
#   python tools/prepare_data.py numina --hub --output data/numina/train.jsonl
#   python tools/prepare_data.py numina --hub --split test --output data/numina/test.jsonl
#   hf download Qwen/Qwen2.5-Math-7B --local-dir models/Qwen2.5-Math-7B
#   bash examples/qwen2.5-math-7b-numina.sh [more flags, which win over those below]
#
# HF_CHECKPOINT, DATA_DIR, RUN_DIR and GPUS change the places and the number of GPUs. Started again, it goes on from its
# newest checkpoint.
#
# The settings are those of the GFT paper (arXiv:2604.14258) and of its released script for the 1.5B model: lr 1e-6, 128
# prompts and 4 steps a rollout, prompts of 1024 and responses of 2048 tokens, groups of 1 expert, 3 teacher and 4 own
# answers. tau is the best of the paper's sweep, 0.7; the script has 0.1. NuminaMath has no teacher responses: until you
# add three {"text": ..., "source": "teacher"} to `responses` of each row, own answers stand in for them.
#
# We have not run this recipe on GPUs: its flags are tested, its memory is estimated and its results are unknown.
set -euo pipefail
cd "$(dirname "$0")/.."

HF_CHECKPOINT=${HF_CHECKPOINT:-models/Qwen2.5-Math-7B}
DATA_DIR=${DATA_DIR:-data/numina}
RUN_DIR=${RUN_DIR:-runs/qwen2.5-math-7b-numina}
GPUS=${GPUS:-8}

MODEL_ARGS=(
    --hf-checkpoint "$HF_CHECKPOINT"
    --hf-export "$RUN_DIR/hf"
    --bf16
)
DATA_ARGS=(
    --prompt-data "$DATA_DIR/train.jsonl"
    --eval-prompt-data "$DATA_DIR/test.jsonl"
    --seq-length 3072
    --max-prompt-length 1024
)
PARALLEL_ARGS=(
    --tensor-model-parallel-size 2
    --sequence-parallel
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    # The ranks wait for the one whose answers are longest; 10 minutes, the default, may be short for that.
    --distributed-timeout-minutes 60
)
MEMORY_ARGS=(
    --max-tokens-per-gpu 16384
    --megatron
    transformer.recompute_granularity=full
    transformer.recompute_method=uniform
    transformer.recompute_num_layers=1
)
ROLLOUT_ARGS=(
    --rollout-batch-size 128
    --num-steps-per-rollout 4
    --n-expert 1
    --n-teacher 3
    --n-self 4
    --rollout-max-response-len 2048
    --rollout-temperature 1.0
    --rollout-top-p 1.0
    --max-concurrent-samples 64
    --rm-type math
)
LOSS_ARGS=(
    --loss gft
    --tau 0.7
)
OPTIMIZER_ARGS=(
    --train-iters 312 # 78 rollouts of 128 prompts, 4 steps each: the paper's 10k prompts, once
    --lr 1e-6
    --lr-decay-style constant
    --lr-warmup-iters 0
    --weight-decay 0.01
    --clip-grad 1.0
    --seed 1234
)
CHECKPOINT_ARGS=(
    --run-dir "$RUN_DIR"
    --save-interval 52
    --keep-last 2
)
EVAL_ARGS=(
    --eval-interval 52
    --n-samples-per-eval-prompt 8
)

torchrun --standalone --nproc-per-node "$GPUS" examples/pretrain_gft.py \
    "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${MEMORY_ARGS[@]}" "${ROLLOUT_ARGS[@]}" \
    "${LOSS_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${CHECKPOINT_ARGS[@]}" "${EVAL_ARGS[@]}" "$@"
