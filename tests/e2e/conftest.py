"""The toy task, made with the tools that a user has: data, tokenizer and a tiny random model."""

from pathlib import Path

import pytest
from e2e_runs import run_tool

CHARACTERS = "0123456789+-*=,:"


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """data/{train,warmup,test}.jsonl and model/ (Qwen2, 4 layers)."""
    folder = tmp_path_factory.mktemp("toy")
    run_tool("prepare_data.py", "countdown", "--output-dir", folder / "data", "--seed", 1)
    run_tool(
        "make_tiny_model.py", "--output", folder / "model", "--characters", CHARACTERS, "--num-layers", 4,
        "--hidden-size", 32, "--intermediate-size", 64, "--max-position-embeddings", 32,
    )  # fmt: skip
    return folder


@pytest.fixture
def flags(toy, tmp_path) -> list[object]:
    """A short GFT run on it; tests add layout and length, and override what they are about (the last flag wins)."""
    return [
        "--hf-checkpoint", toy / "model",
        "--prompt-data", toy / "data" / "train.jsonl",
        "--run-dir", tmp_path / "run",
        "--rm-type", "examples/countdown_reward.py:score",
        "--seq-length", 32,
        "--rollout-max-response-len", 6,
        "--rollout-batch-size", 8,
        "--make-vocab-size-divisible-by", 4,
        "--lr", 1e-3,
        "--eval-interval", 0,
        "--save-interval", 0,
    ]  # fmt: skip
