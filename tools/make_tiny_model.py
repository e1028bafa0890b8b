"""Write a Hugging Face folder with a tiny random model and a tokenizer that fits it: for tests and the quickstart.

AutoTokenizer loads every model of type qwen2 as Qwen2Tokenizer, whatever the files say: the same tokens for the
characters of the vocabulary, but others are left out instead of becoming <unk>, and text is normalised to NFC.

python tools/make_tiny_model.py --output tiny --characters "0123456789+-*=,:"
python tools/make_tiny_model.py --output tiny --tokenizer byte-bpe --corpus train.jsonl --vocab-size 1024
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils.logging import disable_progress_bar

_PAD, _EOS, _UNK = "<pad>", "<eos>", "<unk>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A tiny random model."""

    output: Path
    """Folder to write."""
    family: Literal["qwen2", "qwen3", "llama", "mixtral"] = "qwen2"
    """Architecture."""
    num_experts: int = 4
    """Experts in each layer (mixtral)."""
    hidden_size: int = 96
    """Width."""
    num_layers: int = 3
    """Layers."""
    num_heads: int = 4
    """Attention heads."""
    num_kv_heads: int = 2
    """Key and value heads."""
    intermediate_size: int = 256
    """Width inside the MLP."""
    max_position_embeddings: int = 128
    """Longest sequence."""
    init_std: float = 0.07
    """Standard deviation of the initial weights."""
    tie_embeddings: bool = True
    """One matrix for the embedding and the output layer."""
    seed: int = 0
    """Seed of the weights."""
    tokenizer: Literal["characters", "byte-bpe"] = "characters"
    """One token a character, or a byte-level BPE trained on --corpus."""
    characters: str = "\n " + string.digits + string.ascii_letters + "+-*/=<>()[]{}#$%&,.:;?!'\"_\\^|~@`"
    """ASCII characters of the vocabulary; others become <unk>."""
    corpus: tuple[Path, ...] = ()
    """Text files to train the byte-level BPE on."""
    vocab_size: int = 1024
    """Tokens of the byte-level BPE, at most."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"--hidden-size {self.hidden_size} has to be a multiple of --num-heads {self.num_heads}, and that of "
                f"--num-kv-heads {self.num_kv_heads}"
            )
        if not self.characters.isascii():
            raise ValueError("--characters: only ASCII characters can be tokens; use --tokenizer byte-bpe for others")
        if self.tokenizer == "byte-bpe" and not self.corpus:
            raise ValueError("--tokenizer byte-bpe needs --corpus: the text files to train it on")
        smallest = 3 + len(pre_tokenizers.ByteLevel.alphabet())
        if self.tokenizer == "byte-bpe" and self.vocab_size < smallest:
            raise ValueError(f"--vocab-size {self.vocab_size}: byte-bpe needs at least {smallest}")


def write_tiny_model(settings: TinyModel) -> None:
    """Write config.json, tokenizer and safetensors to `settings.output`. Equal settings give equal files."""
    tokenizer = _tokenizer(settings)
    config = AutoConfig.for_model(
        settings.family,
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.hidden_size // settings.num_heads,
        max_position_embeddings=settings.max_position_embeddings,
        initializer_range=settings.init_std,
        tie_word_embeddings=settings.tie_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"num_local_experts": settings.num_experts} if settings.family == "mixtral" else {}),
    )
    disable_progress_bar()
    set_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(settings.output)
    tokenizer.save_pretrained(settings.output)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{settings.output}: {settings.family}, {num_parameters:,} parameters, {len(tokenizer)} tokens")


def _tokenizer(settings: TinyModel) -> PreTrainedTokenizerFast:
    backend = _byte_bpe(settings) if settings.tokenizer == "byte-bpe" else _characters(settings.characters)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNK,
        chat_template=_CHAT_TEMPLATE,
        model_max_length=settings.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def _characters(characters: str) -> Tokenizer:
    # A byte-level BPE without merges: every ASCII character is a token, whichever class loads the files.
    to_token = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = [to_token.pre_tokenize_str(character)[0][0] for character in characters]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([_PAD, _EOS, _UNK, *tokens]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=_UNK))
    tokenizer.pre_tokenizer = to_token
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_bpe(settings: TinyModel) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[_PAD, _EOS, _UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(settings.corpus), trainer)
    return tokenizer


def _lines(files: tuple[Path, ...]) -> Iterator[str]:
    for path in files:
        with path.open(encoding="utf-8") as file:
            yield from file


def main() -> None:
    try:
        write_tiny_model(tyro.cli(TinyModel, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
