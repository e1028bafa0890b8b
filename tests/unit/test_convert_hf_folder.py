"""Damaged, hostile and foreign folders are refused in one line that names the file and the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from gft_megatron.convert import HfFolder

INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save_model(tmp_path / "single", CONFIGS["qwen3"]())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_model(tmp_path / "sharded", CONFIGS["qwen3"](), shard="120KB")


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as raised:
        HfFolder(path).check_weights()
    message = str(raised.value)
    assert "\n" not in message
    return message


def change_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_whole_folders_are_accepted(single: Path, sharded: Path) -> None:
    for path in (single, sharded):
        HfFolder(path).check_weights()
    assert len(list(sharded.glob("*.safetensors"))) > 2
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(HfFolder(sharded).tensor(name), load_file(single / "model.safetensors")[name])


def test_truncation_at_any_offset(single: Path) -> None:
    file = single / "model.safetensors"
    content = file.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    in_header = [round(i * header_end / 20) for i in range(21)]
    in_weights = [header_end + round(i * (len(content) - 1 - header_end) / 30) for i in range(1, 31)]
    for size in in_header + in_weights:
        file.write_bytes(content[:size])
        assert refusal(single).startswith(f"{file} is not a whole safetensors file ({size} bytes)")
    file.write_bytes(content + b"\0")
    assert str(file) in refusal(single)


@pytest.mark.parametrize("header_length", [2**63, 2**64 - 1, 2**40, 0])
def test_header_length_that_lies(single: Path, header_length: int) -> None:
    file = single / "model.safetensors"
    file.write_bytes(header_length.to_bytes(8, "little") + file.read_bytes()[8:])
    assert str(file) in refusal(single)


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    message = refusal(sharded)
    assert f"{shard} is missing" in message and "tensor 'model." in message


def test_index_that_does_not_fit_its_files(sharded: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    original = (sharded / INDEX).read_text()
    holder = json.loads(original)["weight_map"][name]
    other = next(file.name for file in sharded.glob("*.safetensors") if file.name != holder)

    change_json(sharded / INDEX, lambda index: index["weight_map"].update({name: other}))
    assert repr(name) in refusal(sharded) and "index.json" in refusal(sharded)

    (sharded / INDEX).write_text(original)
    change_json(sharded / INDEX, lambda index: index["weight_map"].pop(name))
    assert f"{sharded / holder} holds tensor {name!r}" in refusal(sharded)

    for outside in ("../single/model.safetensors", "/etc/passwd", 3, None):
        (sharded / INDEX).write_text(original)
        change_json(sharded / INDEX, lambda index, file=outside: index["weight_map"].update({name: file}))
        assert f"tensor {name!r} is in {outside!r}" in refusal(sharded)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', "[" * 100_000, "\x00\xff"])
def test_index_that_is_no_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert str(sharded / INDEX) in refusal(sharded)


def test_missing_unexpected_misshapen_and_integer_tensors(single: Path) -> None:
    name = "model.layers.1.self_attn.k_norm.weight"
    original = (single / "model.safetensors").read_bytes()
    changes: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
        (lambda tensors: tensors.pop(name), f"no file holds tensor {name!r}"),
        (lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}), "tensor 'model.extra.weight'"),
        (lambda tensors: tensors.update({name: torch.ones(15)}), f"tensor {name!r} has shape [15]"),
        (lambda tensors: tensors.update({name: torch.ones(16, dtype=torch.int8)}), f"tensor {name!r} has dtype I8"),
        (lambda tensors: tensors.update({name: torch.ones(16).to(torch.float8_e4m3fn)}), "dtype F8_E4M3"),
    ]
    for change, expected in changes:
        (single / "model.safetensors").write_bytes(original)
        change_weights(single, change)
        message = refusal(single)
        assert expected in message and str(single) in message


def test_weights_of_another_size_than_the_configuration(single: Path) -> None:
    change_json(single / "config.json", lambda config: config.update(intermediate_size=84))
    assert "'model.layers.0.mlp.down_proj.weight' has shape [64, 80], config.json makes it [64, 84]" in refusal(single)


def test_stale_file_beside_an_index(single: Path, sharded: Path) -> None:
    (single / "model.safetensors").rename(sharded / "model.safetensors")
    assert "holds both" in refusal(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_unread(single: Path, tmp_path: Path, name: str) -> None:
    (single / "model.safetensors").unlink()
    marker = tmp_path / "executed"
    (single / name).write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    assert f"{single / name}: pickled weights are never read" in refusal(single)
    assert not marker.exists()


def test_no_weights_no_configuration_no_folder(single: Path, tmp_path: Path) -> None:
    (single / "model.safetensors").unlink()
    HfFolder(single)  # --random-init needs only the configuration
    assert "neither" in refusal(single)
    (single / "config.json").unlink()
    assert f"cannot read {single / 'config.json'}" in refusal(single)
    assert "absent" in refusal(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda config: config.update(model_type="gpt2"), "known: LlamaForCausalLM"),
        (lambda config: config.pop("model_type"), "known: LlamaForCausalLM"),
        (lambda config: config.update(architectures=["Qwen3MoeForCausalLM"]), "Qwen3MoeForCausalLM"),
        (lambda config: config.update(architectures="Qwen3ForCausalLM"), "architectures"),
        (lambda config: config.update(hidden_size="64; rm"), "hidden_size"),
        (lambda config: config.update(num_attention_heads=None), "num_attention_heads"),
        (lambda config: config.update(auto_map={"AutoModelForCausalLM": "modeling.Model"}), "auto_map"),
        (lambda config: config.update(quantization_config={"quant_method": "fp8"}), "quantized"),
        (lambda config: config.update(dtype="no_such_type"), "config.json"),
        (lambda config: config.update(num_key_value_heads=0), "num_key_value_heads 0"),
        (lambda config: config.update(vocab_size=-1), "vocab_size -1"),
        (lambda config: config.update(head_dim=0), "head_dim 0"),
        (lambda config: config.update(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "config.json"),
        (lambda config: config.update(rope_parameters={"rope_type": 7, "rope_theta": 1e4}), "config.json"),
        (lambda config: config.update(rope_parameters=3), "config.json"),
    ],
)
def test_configurations_that_are_refused(single: Path, change: Callable[[dict], object], expected: str) -> None:
    change_json(single / "config.json", change)
    message = refusal(single)
    assert expected in message and str(single / "config.json") in message


def test_code_of_a_folder_is_not_run(single: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (single / "modeling.py").write_text(f"open({str(marker)!r}, 'w')\n")
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    change_json(single / "config.json", lambda config: config.update(auto_map=auto_map))
    assert "auto_map" in refusal(single)
    assert not marker.exists()
