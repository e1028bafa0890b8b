"""Megatron's dist_checkpointing loads what we wrote, and we read what it wrote, under any layout, bit for bit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, CONFIGS_WITH_EXPERTS, save_model
from safetensors.torch import load_file
from torchrun import torchrun

from gft_megatron.convert.hf_to_megatron import plan_hf_to_megatron
from gft_megatron.convert.megatron_to_hf import plan_megatron_to_hf
from gft_megatron.convert.torch_dist_reader import TorchDistFolder

WORKER = Path(__file__).with_name("convert_checkpoint_worker.py")
LAYOUTS = ["2x1", "1x2", "2x2"]  # TP x PP
LAYOUTS_OF_EXPERTS = ["1x1x2", "2x2x2"]  # TP x PP x EP
SINGLETON_LAYOUTS = ("2x2", "2x2x2")  # as in the worker
# A family with experts is every family's attention and MLP beside them. Cut up for one rank or for two.
MODELS = {"qwen2-tied": 1, "qwen3": 2, "llama3-tied": 2, "mistral": 1}
MODELS_WITH_EXPERTS = {
    "mixtral": 2,
    "qwen3-moe-tied": 1,
    "qwen3-moe-unequal": 2,
    "deepseek-v3": 2,
    "deepseek-v3-uncompressed": 1,
}
if find_spec("megatron.core.transformer.mla_qk_norm_config"):  # megatron-core 0.19: refused, see training/model.py
    del MODELS_WITH_EXPERTS["deepseek-v3-uncompressed"]
NUM_LAYERS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    for name, tp_size in {**MODELS, **MODELS_WITH_EXPERTS}.items():
        config = {**CONFIGS, **CONFIGS_WITH_EXPERTS}[name]()
        config.num_hidden_layers = NUM_LAYERS
        if hasattr(config, "layer_types"):
            config.layer_types = ["full_attention"] * NUM_LAYERS
        # A router's bias is float32 there too.
        save_model(root / name / "hf", config, torch.bfloat16 if name == "deepseek-v3" else torch.float32)
        conversion = plan_hf_to_megatron(
            root / name / "hf",
            root / name / "megatron",
            tp_size=tp_size,
            make_vocab_size_divisible_by=64,
            dtype=None,
            workers=2,
        )
        conversion.run(lambda count: None)
    return [root / name for name in (*MODELS, *MODELS_WITH_EXPERTS)]


@pytest.fixture(scope="module")
def saved(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LAYOUT/NAME/iter_0000003, after every layout has loaded the converted checkpoint and found it right."""
    out = tmp_path_factory.mktemp("out")
    done = torchrun(
        WORKER, "--out", out, "--layouts", *LAYOUTS, *LAYOUTS_OF_EXPERTS, "--folders", *folders, num_ranks=4
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS + LAYOUTS_OF_EXPERTS)
def test_what_megatron_saved_comes_back(folders: list[Path], saved: Path, tmp_path: Path, layout: str) -> None:
    for folder in (folder for folder in folders if (folder.name in MODELS) == (layout in LAYOUTS)):
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
            assert converted[name].dtype is tensor.dtype and torch.equal(converted[name], tensor), name
        keys = TorchDistFolder(checkpoint / "iter_0000003").tensors.keys()
        fc1 = "linear_fc1.weight_v" if folder.name in MODELS else "experts.experts.1.linear_fc1.weight_v"
        is_numbered = f"decoder.layers.3.mlp.{fc1}" in keys
        assert is_numbered == (layout in SINGLETON_LAYOUTS) and "optimizer.state.exp_avg.x" in keys
