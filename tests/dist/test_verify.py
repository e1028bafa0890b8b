"""`tools/convert_checkpoint.py verify` as a user starts it: ranks of its own, a line for the tensors and one for the
logits, and a status that says whether the two sides are one model."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import convert_checkpoint
import pytest
from hf_models import CONFIGS_WITH_EXPERTS, save_model
from safetensors.torch import load_file, save_file
from torchrun import ROOT

from gft_megatron.convert.hf_to_megatron import plan_hf_to_megatron

NUM_TENSORS = 3 + 9 + 3 + 9 + 5 + 3 * 8  # whole model, a dense layer, one with 8 experts and a shared one


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "convert_checkpoint.py", *map(str, arguments)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder and its checkpoint: latent attention, a layer without experts and one with."""
    root = tmp_path_factory.mktemp("sides")
    config = CONFIGS_WITH_EXPERTS["deepseek-v3"]()
    config.num_hidden_layers = 2
    config.initializer_range = 0.15  # attention that depends on its positions
    save_model(root / "hf", config)
    plan_hf_to_megatron(
        root / "hf", root / "megatron", tp_size=1, make_vocab_size_divisible_by=64, dtype=None, workers=1
    ).run(lambda count: None)  # fmt: skip
    return root / "hf", root / "megatron"


def test_the_same_model_under_another_layout_and_padding(sides: tuple[Path, Path]) -> None:
    layout = ("--tensor-model-parallel-size", 2, "--expert-model-parallel-size", 2)
    done = run("verify", *sides, *layout, "--prompt-length", 200)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"tensors +{NUM_TENSORS} of {NUM_TENSORS} are bitwise the same", done.stdout), done.stdout
    found = re.search(r"logits +of 800 positions, TP 2 x PP 1 x EP 2, float32: largest difference (\S+)", done.stdout)
    assert found and 0 < float(found[1]) <= 1e-4, done.stdout
    assert "100.00%" in done.stdout


@pytest.fixture(scope="module")
def altered(sides: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with one weight changed."""
    other = shutil.copytree(sides[0], tmp_path_factory.mktemp("altered") / "hf")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][5] += 0.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return other


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """What the command ends with before it starts ranks."""
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "verify", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        convert_checkpoint.main()
    return str(ended.value)


def test_another_tensor(
    sides: tuple[Path, Path], altered: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(monkeypatch, altered, sides[1])
    assert line.startswith(
        f"error: tensors {NUM_TENSORS - 1} of {NUM_TENSORS} are bitwise the same; the worst is 'model.norm.weight'"
    ), line
    assert "\n" not in line and "logits" not in capsys.readouterr().out


def test_no_ranks(sides: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    line = refusal(monkeypatch, *sides, "--expert-model-parallel-size", 0)
    assert line == "error: --expert-model-parallel-size 0: it has to be at least 1"


def test_other_logits(sides: tuple[Path, Path], altered: Path) -> None:
    done = run("verify", altered, sides[1], "--no-tensors", "--prompt-length", 16)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"logits of 64 positions.*largest difference \d.*expected at most 0.0001", line), line
    assert "Traceback" not in done.stderr
