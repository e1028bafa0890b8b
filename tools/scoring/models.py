"""Load Hugging Face models and tokenizers for scoring, and give models responses a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from scoring.method import Method, Response
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, set_verbosity_error


@dataclass(frozen=True, kw_only=True)
class ModelMethod(Method):
    """The flags of methods that run a model."""

    device: Literal["cpu", "cuda"] = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Where models run."""
    bf16: bool = False
    """Run models in bfloat16; default fp32."""
    tokens_per_pass: int = 4096
    """Tokens, padding included, that a model is given at a time; a longer sequence goes alone."""

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: there is no GPU here that this PyTorch can use")
        if self.tokens_per_pass < 1:
            raise ValueError(f"--tokens-per-pass is {self.tokens_per_pass}; it has to be at least 1")

    def load(self, auto_class: Any, flag: str, folder: str) -> PreTrainedModel:
        """The model of a Hugging Face folder, weights from safetensors.

        Raises:
            ValueError: it cannot be loaded, or weights are missing and would be random.
        """
        disable_progress_bar()
        set_verbosity_error()  # its report of weights that are left over, such as the output layer of a base model
        try:
            model, report = auto_class.from_pretrained(
                folder,
                dtype=torch.bfloat16 if self.bf16 else torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"{flag} {folder}: {' '.join(str(error).split())[:200]}") from None
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])[0]
            raise ValueError(f"{flag} {folder}: the files have no {missing!r}, which a {type(model).__name__} needs")
        return model.to(self.device).eval()


def load_tokenizer(flag: str, folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {folder}: no tokenizer: {' '.join(str(error).split())[:200]}") from None


def num_positions(folder: str) -> int | None:
    """Longest sequence of this model, where its configuration tells.

    Raises:
        ValueError: there is no configuration.
    """
    try:
        return getattr(AutoConfig.from_pretrained(folder, local_files_only=True), "max_position_embeddings", None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no model: {' '.join(str(error).split())[:200]}") from None


def similar_lengths(lengths: Sequence[int], tokens_per_pass: int) -> Iterator[list[int]]:
    """All indices into lengths, the longest first, in groups of at most so many tokens when padded to equal length."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = max(1, tokens_per_pass // lengths[order[start]])
        yield order[start : start + count]
        start += count


def padded_batches(responses: Sequence[Response], tokens_per_pass: int) -> Iterator[tuple[list[int], Tensor]]:
    """Indices into responses, and their prompts and tokens [b, s]. What stands behind the end is 0: to a causal model
    it is the future, so no mask is needed."""
    whole = [np.concatenate([response.prompt_ids, response.token_ids]) for response in responses]
    for members in similar_lengths([len(tokens) for tokens in whole], tokens_per_pass):
        batch = torch.zeros(len(members), len(whole[members[0]]), dtype=torch.int64)
        for row, i in zip(batch, members, strict=True):
            row[: len(whole[i])] = torch.from_numpy(whole[i])
        yield members, batch
