"""Hugging Face folder -> Megatron shards -> Hugging Face tensors: every tensor comes back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, CONFIGS_WITH_EXPERTS, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from gft_megatron.convert import HfFolder, ModelShape, expected_hf_shapes, hf_names_of, merge_to_hf, tensor_spec

# Parameters of a GPTModel, as named_parameters() of megatron-core 0.16.1 lists them.
WHOLE_MODEL = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]
LOCAL_NORMS = ["input_layernorm.weight", "pre_mlp_layernorm.weight"]
TRANSFORMER_ENGINE_NORMS = ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"]
LINEARS = [
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
]
OF_FAMILY = {
    "qwen2": ["self_attention.linear_qkv.bias"],
    "qwen3": ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"],
    "llama": [],
    "mistral": [],
}
EXPERTS = {
    "local": "mlp.experts.local_experts.{e}.{linear}.weight",
    "transformer-engine": "mlp.experts.{linear}.weight{e}",
}


def megatron_names(shape: ModelShape, norms: list[str]) -> list[str]:
    in_layer = norms + LINEARS + OF_FAMILY[shape.model_type]
    untied = [] if shape.tie_word_embeddings else ["output_layer.weight"]
    return WHOLE_MODEL + untied + [f"decoder.layers.{i}.{name}" for i in range(shape.num_layers) for name in in_layer]


def shards_of(folder: HfFolder, name: str, tp_size: int, padded_vocab_size: int) -> list[Tensor]:
    return [
        folder.load_shard(name, tp_rank=rank, tp_size=tp_size, padded_vocab_size=padded_vocab_size)
        for rank in range(tp_size)
    ]


@pytest.mark.parametrize("norms", [LOCAL_NORMS, TRANSFORMER_ENGINE_NORMS], ids=["local", "transformer-engine"])
@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_every_tensor_comes_back(tmp_path: Path, model: str, tp_size: int, norms: list[str]) -> None:
    folder = HfFolder(save_model(tmp_path / "hf", CONFIGS[model]()))
    padded_vocab_size = 64 * tp_size * 3
    exported: dict[str, Tensor] = {}
    for name in megatron_names(folder.shape, norms):
        shards = shards_of(folder, name, tp_size, padded_vocab_size)
        if not tensor_spec(folder.shape, name).is_sharded:
            shards = shards[:1]
        for hf_name, tensor in merge_to_hf(folder.shape, name, shards):
            assert hf_name not in exported
            exported[hf_name] = tensor
    saved = load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == saved.keys() == expected_hf_shapes(folder.shape).keys()
    for name, tensor in saved.items():
        assert torch.equal(exported[name], tensor), name


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("model", CONFIGS_WITH_EXPERTS)
def test_every_expert_comes_back(tmp_path: Path, model: str, kind: str) -> None:
    folder = HfFolder(save_model(tmp_path / "hf", CONFIGS_WITH_EXPERTS[model]()))
    saved = load_file(tmp_path / "hf" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected_hf_shapes(folder.shape)
    exported: dict[str, Tensor] = {}
    for layer, has_experts in enumerate(folder.shape.moe.layers):
        norm = "pre_mlp_layernorm.weight" if has_experts or kind == "local" else "mlp.linear_fc1.layer_norm_weight"
        names = [norm, "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
        if has_experts:
            linears = ("linear_fc1", "linear_fc2")
            every = range(folder.shape.num_moe_experts)
            experts = [EXPERTS[kind].format(e=e, linear=linear) for e in every for linear in linears]
            names = [norm, "mlp.router.weight", *experts]
            if folder.shape.moe.sigmoid:
                names += ["mlp.router.expert_bias", *(f"mlp.shared_experts.{linear}.weight" for linear in linears)]
        for name in (f"decoder.layers.{layer}.{name}" for name in names):
            spec = tensor_spec(folder.shape, name)
            assert spec.is_expert == (".experts." in name)
            shards = shards_of(folder, name, 2, 0)[: 2 if spec.is_sharded else 1]
            exported.update(merge_to_hf(folder.shape, name, shards))
    in_mlp = {name for name in saved if ".mlp." in name or "sparse_moe" in name or "post_attention" in name}
    assert exported.keys() == in_mlp
    for name, tensor in exported.items():
        assert torch.equal(tensor, saved[name]), name
    with pytest.raises(ValueError, match="no tensor for"):  # a dense layer's, in one with experts or the other way
        wrong = "mlp.linear_fc1.weight" if folder.shape.moe.layers[0] else "mlp.router.weight"
        tensor_spec(folder.shape, f"decoder.layers.0.{wrong}")


def test_bfloat16_in_several_files_keeps_its_bits(tmp_path: Path) -> None:
    path = save_model(tmp_path / "hf", CONFIGS["qwen2"](), torch.bfloat16, shard="60KB")
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 2
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    folder = HfFolder(path)
    assert folder.shape.dtype is torch.bfloat16
    for name in megatron_names(folder.shape, LOCAL_NORMS):
        for hf_name, tensor in merge_to_hf(folder.shape, name, shards_of(folder, name, 2, 256)[:2]):
            assert tensor.dtype is torch.bfloat16 and torch.equal(tensor, saved[hf_name])


def test_output_layer_of_a_tied_model_is_loaded_and_never_exported(tmp_path: Path) -> None:
    """The last pipeline stage has a copy of the embedding as its own parameter."""
    folder = HfFolder(save_model(tmp_path / "hf", CONFIGS["qwen2-tied"]()))
    assert hf_names_of(folder.shape, "output_layer.weight") == ("model.embed_tokens.weight",)
    shards = shards_of(folder, "output_layer.weight", 2, 256)
    for copy, original in zip(shards, shards_of(folder, "embedding.word_embeddings.weight", 2, 256), strict=True):
        assert torch.equal(copy, original)
    assert list(merge_to_hf(folder.shape, "output_layer.weight", shards)) == []


def test_a_stored_copy_of_tied_embeddings_has_to_be_one(tmp_path: Path) -> None:
    path = save_model(tmp_path / "hf", CONFIGS["llama3-tied"]()) / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | inv_freq | {"lm_head.weight": embedding.clone()}, path)
    HfFolder(path.parent).check_weights()
    embedding_with_one_change = embedding.clone()
    embedding_with_one_change[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": embedding_with_one_change}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*'lm_head\.weight' differs"):
        HfFolder(path.parent).check_weights()


def test_unknown_parameter_and_undividing_size_are_refused(tmp_path: Path) -> None:
    folder = HfFolder(save_model(tmp_path / "hf", CONFIGS["llama2"]()))
    with pytest.raises(ValueError, match=r"mlp\.router\.weight"):
        tensor_spec(folder.shape, "decoder.layers.0.mlp.router.weight")
    with pytest.raises(ValueError, match="--tensor-model-parallel-size 3 .*allowed: "):
        folder.load_shard("output_layer.weight", tp_rank=0, tp_size=3, padded_vocab_size=384)
