"""The toy task, made with the tools that a user has: data, tokenizer and a tiny random model."""

from pathlib import Path

import pytest
from e2e_runs import run_tool, short_run

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
    """Tests add layout and length, and override what they are about."""
    return [*short_run(toy), "--run-dir", tmp_path / "run"]
