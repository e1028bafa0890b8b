"""Merged adapters against PEFT's own merge; what cannot be merged is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, save_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.hf_to_megatron import plan_hf_to_megatron
from gft_megatron.convert.megatron_to_hf import plan_megatron_to_hf

ADAPTERS = {
    "all": LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"),
    "rank stabilised": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "of several ranks": LoraConfig(
        r=4, lora_alpha=8, target_modules=["k_proj", "gate_proj", "o_proj"],
        rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 1, "model.layers.1.self_attn.o_proj": 32},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "hf", CONFIGS["qwen2"]())


def save_adapter(base: Path, config: LoraConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Write it as a user would; returns the weights as PEFT merges them."""
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_as_peft_does(base: Path, tmp_path: Path, name: str) -> None:
    expected = save_adapter(base, ADAPTERS[name], tmp_path / "adapter")
    before = load_file(base / "model.safetensors")
    # The parts of two tensor-parallel ranks are merged apart.
    settings = {"tp_size": 2, "make_vocab_size_divisible_by": 1, "dtype": None, "workers": 1}
    plan_hf_to_megatron(base, tmp_path / "megatron", lora_adapter=tmp_path / "adapter", **settings).run(print)
    plan_megatron_to_hf(
        tmp_path / "megatron", tmp_path / "hf", config_folder=None, dtype=None, max_shard_bytes=10**9, workers=1
    ).run(print)
    merged = load_file(tmp_path / "hf" / "model.safetensors")
    assert merged.keys() == before.keys() == expected.keys()
    changed = 0
    for tensor_name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[tensor_name], atol=1e-6, rtol=1e-6, msg=tensor_name)
        changed += not torch.equal(tensor, before[tensor_name])
    assert changed == {"all": 21, "rank stabilised": 6, "of several ranks": 9}[name]


def test_rounded_once(base: Path, tmp_path: Path) -> None:
    """Of bfloat16 weights the float32 sum is rounded, and nothing before it."""
    half = save_model(tmp_path / "half", CONFIGS["qwen2"](), dtype=torch.bfloat16)
    save_adapter(base, ADAPTERS["all"], tmp_path / "adapter")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.2.mlp.up_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    weight = load_file(half / "model.safetensors")[f"{name}.weight"]
    found = HfFolder(half, lora_adapter=tmp_path / "adapter").tensor(f"{name}.weight")
    exact = weight.double() + 12 / 4 * (b @ a)
    assert found.dtype is torch.bfloat16
    # Half a unit in the last place of 8 bits, and what float32 adds to it.
    assert ((found.double() - exact).abs() <= exact.abs() * 2.0**-8).all()


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(base, ADAPTERS["all"], folder)
    return folder


CONFIG_INJURIES = {
    "peft_type": ("IA3", "peft_type 'IA3', expected 'LORA'"),
    "use_dora": (True, "use_dora True cannot be merged"),
    "fan_in_fan_out": (True, "fan_in_fan_out True cannot be merged"),
    "alora_invocation_tokens": ([5, 6], "alora_invocation_tokens .* cannot be merged"),
    "bias": ("all", "bias 'all' cannot be merged, expected 'none'"),
    "modules_to_save": (["lm_head"], r"modules_to_save \['lm_head'\] cannot be merged"),
    "init_lora_weights": ("pissa_niter_4", "init_lora_weights 'pissa_niter_4' has changed the base weights too"),
    "lora_alpha": ("8", "lora_alpha '8', expected a number"),
    "alpha_pattern": ({"(a+)+": 2}, r"alpha_pattern '\(a\+\)\+', expected the name of a module"),
}


def injured(adapter: Path, folder: Path, **config: object) -> Path:
    folder.mkdir()
    content = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    (folder / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize("field", CONFIG_INJURIES)
def test_refused_by_its_configuration(base: Path, adapter: Path, tmp_path: Path, field: str) -> None:
    value, message = CONFIG_INJURIES[field]
    with pytest.raises(ValueError, match=message):
        HfFolder(base, lora_adapter=injured(adapter, tmp_path / "broken", **{field: value})).check_weights()


def test_refused_by_its_tensors(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = injured(adapter, tmp_path / "broken")
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    module = "base_model.model.model.layers.0.mlp.up_proj"
    for tensors, message in (
        ({**whole, f"{module}.lora_magnitude_vector.weight": torch.ones(4)}, "adapts no weight of this model"),
        ({**whole, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 4)}, "adapts no weight"),
        ({name: x for name, x in whole.items() if name != f"{module}.lora_B.weight"}, "up_proj lacks its lora_B"),
        ({**whole, f"{module}.lora_A.weight": torch.ones(3, 64)}, r"lora_B \[80, 4\] and lora_A \[3, 64\], which make"),
        ({}, "holds no tensors"),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            HfFolder(base, lora_adapter=folder).check_weights()
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="lacks adapter_model.safetensors; .* never read"):
        HfFolder(base, lora_adapter=folder).check_weights()
