"""A converted checkpoint that is not the model any more is told from one that is, to the last bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, save_model
from safetensors.torch import load_file, save_file

from gft_megatron.convert.comparison import WeightsToCompare
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.hf_to_megatron import plan_hf_to_megatron
from gft_megatron.convert.torch_dist_reader import find_checkpoint


def converted(source: Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    plan_hf_to_megatron(
        source, target, tp_size=2, make_vocab_size_divisible_by=64, dtype=dtype, workers=1
    ).run(lambda count: None)  # fmt: skip
    return find_checkpoint(target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("hf") / "model", CONFIGS["qwen3-tied"]())


def altered(folder: Path, target: Path, name: str, change: float) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name].view(-1)[7] = change
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_same_model(folder: Path, tmp_path: Path, dtype: torch.dtype | None) -> None:
    done = []
    sides = WeightsToCompare(HfFolder(folder), converted(folder, tmp_path / "out", dtype))
    found = sides.compare(done.append)
    assert (found.num_different, found.worst, found.largest_difference) == (0, None, 0.0)
    assert found.num_tensors == len(load_file(folder / "model.safetensors"))
    assert sum(done) == sides.num_bytes == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [3.0, float("nan"), float("inf")])
def test_one_element_differs(folder: Path, tmp_path: Path, name: str, value: float) -> None:
    other = altered(folder, tmp_path / "other", name, value)
    before = load_file(folder / "model.safetensors")[name].view(-1)[7]
    found = WeightsToCompare(HfFolder(other), converted(folder, tmp_path / "out")).compare(lambda count: None)
    assert (found.num_different, found.worst) == (1, name)
    expected = abs(3.0 - float(before)) if value == 3.0 else float("inf")
    assert found.largest_difference == pytest.approx(expected)


def test_a_zero_of_another_sign(folder: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    plus, minus = (altered(folder, tmp_path / str(value), name, value) for value in (0.0, -0.0))
    found = WeightsToCompare(HfFolder(plus), converted(minus, tmp_path / "out")).compare(lambda count: None)
    assert (found.num_different, found.worst, found.largest_difference) == (1, name, 0.0)


def test_the_same_nan_is_no_difference(folder: Path, tmp_path: Path) -> None:
    other = altered(folder, tmp_path / "other", "model.norm.weight", float("nan"))
    found = WeightsToCompare(HfFolder(other), converted(other, tmp_path / "out")).compare(lambda count: None)
    assert found.num_different == 0
