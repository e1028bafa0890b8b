"""`tools/convert_checkpoint.py verify` as a user starts it: ranks of its own, a line for the tensors and one for the
logits, and a status that says whether the two sides are one model."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import convert_checkpoint
import pytest
from conversion.verify import Unequal, Verify, judged, start_ranks, verify
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--expert-model-parallel-size", 0), "--expert-model-parallel-size 0: it has to be at least 1"),
        (("--num-prompts", 0), "--num-prompts 0: it has to be at least 1"),
        (("--prompt-length", -1), "--prompt-length -1: it has to be at least 1"),
        (("--tolerance", "inf"), "--tolerance inf: it has to be a number of at least 0"),
        (("--tolerance", "nan"), "--tolerance nan: it has to be a number of at least 0"),
        (("--no-tensors", "--no-logits"), "--no-tensors --no-logits leave nothing to compare"),
    ],
)
def test_nothing_to_compare(monkeypatch: pytest.MonkeyPatch, flags: tuple[object, ...], message: str) -> None:
    assert refusal(monkeypatch, "hf", "megatron", *flags) == f"error: {message}"


@pytest.mark.parametrize(
    ("bf16", "difference", "same_top1", "is_same"),
    [
        (True, 0.1, 0.99, True),
        (True, 0.1, 0.98, False),
        (True, float("nan"), float("nan"), False),
        (True, float("inf"), 1.0, False),  # the first choice is an infinite logit of both
        (False, 1e-4, 0.5, True),
        (False, 2e-4, 1.0, False),
        (False, float("nan"), 1.0, False),
    ],
)
def test_judged(bf16: bool, difference: float, same_top1: float, is_same: bool) -> None:
    found = SimpleNamespace(
        num_positions=8, largest_difference=difference, worst=(0, 1, 2), same_top1=same_top1
    )  # fmt: skip
    settings = Verify(Path("hf"), Path("megatron"), bf16=bf16)
    with nullcontext() if is_same else pytest.raises(Unequal):
        judged(found, settings)


def test_ranks_of_torchrun_join_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """While rank 0 reads a large model's tensors, the others would give up waiting for it to join."""
    began = []
    monkeypatch.setenv("RANK", "0")
    for name in ("compare_tensors", "compare_logits"):
        monkeypatch.setattr(f"conversion.verify.{name}", lambda settings, name=name: began.append(name))
    verify(Verify(Path("hf"), Path("megatron")))
    verify(Verify(Path("hf"), Path("megatron"), logits=False))
    assert began == ["compare_logits", "compare_tensors"]


def test_a_rank_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has said nothing itself."""
    (tmp_path / "program.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "program.py")])
    with pytest.raises(OSError, match="rank 0 was ended by signal 9"):
        start_ranks(1)


def test_other_logits(sides: tuple[Path, Path], altered: Path) -> None:
    done = run("verify", altered, sides[1], "--no-tensors", "--prompt-length", 16)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"logits of 64 positions.*largest difference \d.*expected at most 0.0001", line), line
    assert "Traceback" not in done.stderr
