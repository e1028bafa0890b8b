"""Whole runs by the command that users type, one for each way of being parallel; the model that comes out opens."""

import json
import math
from pathlib import Path

import pytest
import torch
from e2e_runs import PROGRAM, metrics_of, run_tool
from safetensors.torch import load_file
from torchrun import torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

RUNS = {
    "tensor, fewer prompts than ranks": [
        "--tensor-model-parallel-size", 2, "--sequence-parallel", "--rollout-batch-size", 1, "--eval-interval", 5,
    ],
    "pipeline, several steps a rollout, ratios": [
        "--pipeline-model-parallel-size", 2, "--save-interval", 10,
        "--loss", "grpo", "--n-expert", 0, "--n-teacher", 0, "--n-self", 8, "--num-steps-per-rollout", 2,
        "--rm-type", "tests/e2e/digit_reward.py:score",
    ],
    "data, bf16, distributed optimizer": [
        "--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather",
        "--save-interval", 10,
    ],
    "context, refilled groups, random weights": [
        "--context-parallel-size", 2, "--refill-groups", "--n-teacher", 4, "--random-init",
    ],
    "fused loss, bf16, sequence parallel, ratios": [
        "--fused-linear-loss", "--bf16", "--tensor-model-parallel-size", 2, "--sequence-parallel",
        "--overlap-grad-reduce", "--loss", "grpo", "--n-expert", 0, "--n-teacher", 0, "--n-self", 8,
        "--num-steps-per-rollout", 2, "--rm-type", "tests/e2e/digit_reward.py:score",
    ],
}  # fmt: skip


def test_experts_on_two_ranks(flags, tmp_path):
    """Groups are drawn, trained on, saved and exported; the embedded engine computes the same model."""
    run_tool(
        "make_tiny_model.py", "--output", tmp_path / "moe", "--characters", "0123456789+-*=,:", "--family", "mixtral",
        "--num-layers", 2, "--hidden-size", 32, "--intermediate-size", 48, "--max-position-embeddings", 32,
        "--no-tie-embeddings",
    )  # fmt: skip
    done = torchrun(
        PROGRAM, *flags, "--hf-checkpoint", tmp_path / "moe", "--expert-model-parallel-size", 2, "--train-iters", 3,
        "--use-distributed-optimizer", "--save-interval", 2, "--hf-export", tmp_path / "hf", num_ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    steps = metrics_of(tmp_path / "run")
    assert len(steps) == 3 and all(math.isfinite(step["train/grad_norm"]) for step in steps)
    assert steps[0]["train/log_prob_gap_mean"] < 1e-4
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "hf"))
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == [], "not trained"


@pytest.mark.parametrize("name", RUNS)
def test_ten_steps(flags, tmp_path, toy, name):
    done = torchrun(
        PROGRAM, *flags, "--train-iters", 10, "--hf-export", tmp_path / "hf", *RUNS[name], num_ranks=2
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    steps = metrics_of(tmp_path / "run")
    assert [step["step"] for step in steps] == list(range(1, 11))
    for step in steps:
        assert all(
            math.isfinite(step[key]) for key in ("train/loss", "train/nll", "train/grad_norm", "train/entropy_mean")
        )
        assert 0 < step["train/entropy_mean"] <= math.log(20)
    # The engine and Megatron compute the same model: what differs is rounding, and bf16's is coarse.
    first_gap = next(step["train/log_prob_gap_mean"] for step in steps if "train/log_prob_gap_mean" in step)
    assert first_gap < (0.05 if "bf16" in name else 1e-4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float32)
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(changed), "some weights were not trained"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("1,2,3=6:", add_special_tokens=False).input_ids
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["iterations"] == 10
    if results["checkpoint_dir"] is not None:
        check_conversion(Path(results["checkpoint_dir"]), tmp_path / "hf", tmp_path / "converted")


def check_conversion(checkpoints: Path, exported: Path, out: Path) -> None:
    """The last checkpoint, optimizer and all, converts to what the run itself exported."""
    run_tool("convert_checkpoint.py", "megatron-to-hf", checkpoints, out, "--hf-checkpoint", exported)
    converted, original = (load_file(folder / "model.safetensors") for folder in (out, exported))
    assert converted.keys() == original.keys()
    for tensor_name, tensor in original.items():
        assert torch.equal(converted[tensor_name], tensor), tensor_name


def test_supervised_warm_up_and_evaluation(flags, tmp_path, toy):
    """SFT on recorded responses lowers the NLL, needs no samples, and evaluation samples held-out prompts."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join((toy / "data" / "test.jsonl").open().readlines()[:20]))
    done = torchrun(
        PROGRAM, *flags, "--prompt-data", toy / "data" / "warmup.jsonl", "--loss", "sft",
        "--n-expert", 1, "--n-teacher", 1, "--n-self", 0, "--rollout-batch-size", 320, "--num-steps-per-rollout", 10,
        "--train-iters", 60, "--lr", 3e-3, "--eval-prompt-data", held_out, "--eval-interval", 30,
        "--tensor-model-parallel-size", 2, "--max-tokens-per-gpu", 1024, num_ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    steps = metrics_of(tmp_path / "run")
    assert steps[0]["train/nll"] > 2.5 and steps[-1]["train/nll"] < 1.6
    assert steps[0]["train/loss"] == steps[0]["train/nll"]
    evaluations = json.loads((tmp_path / "run" / "results.json").read_text())["evaluations"]
    assert list(evaluations) == ["0", "30", "60"]
    assert all(e["eval/num_prompts"] == 20 and e["eval/failed_samples"] == 0 for e in evaluations.values())
