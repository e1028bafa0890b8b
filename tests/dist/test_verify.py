"""`tools/convert_checkpoint.py verify` as a user starts it: ranks of its own, a line for the tensors and one for the
logits, and a status that says whether the two sides are one model."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hf_models import CONFIGS, save_model
from safetensors.torch import load_file, save_file
from torchrun import ROOT


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "convert_checkpoint.py", *map(str, arguments)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder and its checkpoint."""
    root = tmp_path_factory.mktemp("sides")
    config = CONFIGS["qwen2-tied"]()
    config.num_hidden_layers, config.layer_types = 2, ["full_attention"] * 2
    config.initializer_range = 0.15  # attention that depends on its positions
    save_model(root / "hf", config)
    done = run("hf-to-megatron", root / "hf", root / "megatron", "--make-vocab-size-divisible-by", 64)
    assert done.returncode == 0, done.stderr
    return root / "hf", root / "megatron"


def test_the_same_model_under_another_layout_and_padding(sides: tuple[Path, Path]) -> None:
    done = run("verify", *sides, "--tensor-model-parallel-size", 2, "--prompt-length", 200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"tensors +26 of 26 are bitwise the same", done.stdout), done.stdout
    difference = re.search(r"logits +of 800 positions, TP 2 x PP 1, float32: largest difference (\S+)", done.stdout)
    assert difference and 0 < float(difference[1]) <= 1e-4, done.stdout
    assert "100.00%" in done.stdout


@pytest.fixture(scope="module")
def altered(sides: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with one weight changed."""
    other = shutil.copytree(sides[0], tmp_path_factory.mktemp("altered") / "hf")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][5] += 0.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return other


def test_another_tensor(sides: tuple[Path, Path], altered: Path) -> None:
    done = run("verify", altered, sides[1])
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: tensors 25 of 26 are bitwise the same; the worst is 'model.norm.weight'"), line
    assert "logits" not in done.stdout


def test_other_logits(sides: tuple[Path, Path], altered: Path) -> None:
    done = run("verify", altered, sides[1], "--no-tensors", "--prompt-length", 16)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"logits of 64 positions.*largest difference \d.*expected at most 0.0001", line), line
    assert "Traceback" not in done.stderr
