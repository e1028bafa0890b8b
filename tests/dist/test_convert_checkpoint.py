"""Megatron's dist_checkpointing loads what we wrote, and we read what it wrote, under any layout, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, save_model
from safetensors.torch import load_file
from torchrun import torchrun

from gft_megatron.convert.hf_to_megatron import plan_hf_to_megatron
from gft_megatron.convert.megatron_to_hf import plan_megatron_to_hf
from gft_megatron.convert.torch_dist_reader import TorchDistFolder

WORKER = Path(__file__).with_name("convert_checkpoint_worker.py")
LAYOUTS = ["1x1", "2x1", "1x2", "2x2"]  # TP x PP
# Between them: biases, norms of heads, tied and untied, cut up for one rank and for two.
MODELS = {"qwen2-tied": 1, "qwen3": 2}
NUM_LAYERS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    for name, tp_size in MODELS.items():
        config = CONFIGS[name]()
        config.num_hidden_layers = NUM_LAYERS
        config.layer_types = ["full_attention"] * NUM_LAYERS
        save_model(root / name / "hf", config)
        conversion = plan_hf_to_megatron(
            root / name / "hf",
            root / name / "megatron",
            tp_size=tp_size,
            make_vocab_size_divisible_by=64,
            dtype=None,
            workers=2,
        )
        conversion.run(lambda count: None)
    return [root / name for name in MODELS]


@pytest.fixture(scope="module")
def saved(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LAYOUT/NAME/iter_0000003, after every layout has loaded the converted checkpoint and found it right."""
    out = tmp_path_factory.mktemp("out")
    done = torchrun(WORKER, "--out", out, "--layouts", *LAYOUTS, "--folders", *folders, num_ranks=4)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_megatron_saved_comes_back(folders: list[Path], saved: Path, tmp_path: Path, layout: str) -> None:
    for folder in folders:
        checkpoint = saved / layout / folder.name
        conversion = plan_megatron_to_hf(
            checkpoint,
            tmp_path / folder.name,
            config_folder=folder / "hf",
            dtype=None,
            max_shard_bytes=5_000_000_000,
            workers=2,
        )
        conversion.run(lambda count: None)
        original = load_file(folder / "hf" / "model.safetensors")
        converted = load_file(tmp_path / folder.name / "model.safetensors")
        assert converted.keys() == original.keys()
        for name, tensor in original.items():
            assert torch.equal(converted[name], tensor), name
    keys = TorchDistFolder(checkpoint / "iter_0000003").tensors.keys()
    is_numbered = "decoder.layers.3.mlp.linear_fc1.weight_v" in keys
    assert is_numbered == (layout == "2x2") and "optimizer.state.exp_avg.x" in keys
