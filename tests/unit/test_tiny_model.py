"""The folders of tools/make_tiny_model.py load, fit together, and their tokenizers lose nothing."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import load_program
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

tiny = load_program("tools/make_tiny_model.py")


def write(folder: Path, **options: Any) -> Path:
    tiny.write_tiny_model(tiny.TinyModel(output=folder, **options))
    return folder


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tie", [True, False])
def test_model_and_tokenizer_fit(tmp_path: Path, family: str, tie: bool) -> None:
    write(tmp_path, family=family, tie_embeddings=tie, characters="0123456789+-*=,:", init_std=0.07)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    config = model.config
    assert config.model_type == family and len(tokenizer) == config.vocab_size == 19
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (3, 96, 2)
    assert tokenizer.eos_token_id == config.eos_token_id == model.generation_config.eos_token_id
    weights = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in weights) is not tie
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert float(weights["model.layers.0.mlp.up_proj.weight"].std()) == pytest.approx(0.07, rel=0.05)
    ids = tokenizer("1,2,3=7:", return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 8) and torch.isfinite(model(ids).logits).all()


def test_seed_decides_the_weights(tmp_path: Path) -> None:
    first, again, other = (write(tmp_path / name, seed=seed) for name, seed in [("a", 1), ("b", 1), ("c", 2)])
    read = [(folder / "model.safetensors").read_bytes() for folder in (first, again, other)]
    assert read[0] == read[1] != read[2]


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def characters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(write(tmp_path_factory.mktemp("characters"), family=request.param))


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def byte_bpe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "corpus.txt").write_text("the quick brown fox\n" * 50)
    write(folder, family=request.param, tokenizer="byte-bpe", corpus=(folder / "corpus.txt",), vocab_size=300)
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text(tiny.TinyModel.characters))
@settings(deadline=None)
def test_every_character_is_one_token(characters: PreTrainedTokenizerBase, text: str) -> None:
    ids = characters(text, split_special_tokens=True)["input_ids"]
    assert len(ids) == len(text) and characters.unk_token_id not in ids and characters.decode(ids) == text


def test_control_tokens_and_unknown_characters(characters: PreTrainedTokenizerBase) -> None:
    assert characters("1<eos>")["input_ids"][-1] == characters.eos_token_id
    unknown = characters("1\t2")["input_ids"][1:-1]
    is_qwen2 = type(characters).__name__ == "Qwen2Tokenizer"
    assert unknown == ([] if is_qwen2 else [characters.unk_token_id])


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_byte_bpe_round_trips_any_text(byte_bpe: PreTrainedTokenizerBase, text: str) -> None:
    if type(byte_bpe).__name__ == "Qwen2Tokenizer":
        text = unicodedata.normalize("NFC", text)
    ids = byte_bpe(text, split_special_tokens=True)["input_ids"]
    assert byte_bpe.decode(ids) == text and byte_bpe.unk_token_id not in ids


def test_byte_bpe_learns_from_the_corpus(byte_bpe: PreTrainedTokenizerBase) -> None:
    assert len(byte_bpe) <= 300 and len(byte_bpe("the quick brown fox")["input_ids"]) == 4


def test_chat_template(characters: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "hi"}]
    text = characters.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "user: hi\nassistant: "


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    for options, message in [
        (dict(hidden_size=95), "--hidden-size 95 has to be a multiple of --num-heads 4"),
        (dict(num_kv_heads=3), "of --num-kv-heads 3"),
        (dict(characters="\u00e9"), "--characters: only ASCII"),
        (dict(tokenizer="byte-bpe"), "--tokenizer byte-bpe needs --corpus"),
        (
            dict(tokenizer="byte-bpe", corpus=(tmp_path,), vocab_size=100),
            "--vocab-size 100: byte-bpe needs at least 259",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny.TinyModel(output=tmp_path, **options)
