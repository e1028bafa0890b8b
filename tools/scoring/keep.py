"""Keep-probability (LLMLingua-2, arXiv:2403.12968): a token matters that a compressor of text would keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scoring.method import Pass, Response, Score
from scoring.models import ModelMethod, load_tokenizer, num_positions, similar_lengths
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Keep(ModelMethod):
    """Semantics: the probability that a token classifier keeps a token, such as one of the LLMLingua-2 models.

    The classifier reads the response alone, in its own sub-tokens. A token scores the mean probability of label 1 of
    the sub-tokens that share a character with it, and 0 where there is none (white space, as a rule).
    """

    model: str
    """Hugging Face folder of a token-classification model: label 0 drops, label 1 keeps."""
    window: int = 512
    """Sub-tokens that the classifier sees at a time, its special ones included; longer responses are cut."""

    def scorer(self, tokenizer: PreTrainedTokenizerBase, responses: Pass) -> Score:
        sub_tokenizer = load_tokenizer("--model", self.model)
        for flag, folder, one in (
            ("--hf-checkpoint", self.hf_checkpoint, tokenizer),
            ("--model", self.model, sub_tokenizer),
        ):
            if not one.is_fast:
                raise ValueError(f"{flag} {folder}: its tokenizer is a slow one, which tells no character positions")
        classifier = self.load(AutoModelForTokenClassification, "--model", self.model)
        if classifier.config.num_labels < 2:
            raise ValueError(f"--model {self.model} has 1 label; it needs 0 (drop) and 1 (keep)")
        least, most = sub_tokenizer.num_special_tokens_to_add() + 1, num_positions(self.model)
        if self.window < least or (most is not None and self.window > most):
            raise ValueError(f"--window is {self.window}; it has to be {least} to {most} for --model {self.model}")

        def score(responses: Sequence[Response]) -> list[np.ndarray]:
            texts = [response.text for response in responses]
            ours = tokenizer(
                texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
            )
            for response, ids in zip(responses, ours["input_ids"], strict=True):
                assert ids == response.token_ids[:-1].tolist(), "not the tokens of data/encode.py"
            sub_tokens = self._keep_probabilities(texts, sub_tokenizer, classifier)
            return [
                _overlap_means(np.array(spans, np.int64).reshape(-1, 2), its)
                for spans, its in zip(ours["offset_mapping"], sub_tokens, strict=True)
            ]

        return score

    def _keep_probabilities(
        self, texts: list[str], tokenizer: PreTrainedTokenizerBase, classifier: PreTrainedModel
    ) -> list[_SubTokens]:
        """The sub-tokens of each text, in order. Windows do not overlap, as in LLMLingua-2."""
        windows = tokenizer(
            texts,
            truncation=True,
            max_length=self.window,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            split_special_tokens=True,
            verbose=False,
        )
        probabilities: dict[int, np.ndarray] = {}
        for members in similar_lengths([len(ids) for ids in windows["input_ids"]], self.tokens_per_pass):
            batch = tokenizer.pad({"input_ids": [windows["input_ids"][i] for i in members]}, return_tensors="pt")
            with torch.no_grad():
                logits = classifier(**batch.to(self.device)).logits  # [b, s, labels]
            for i, row in zip(members, logits.float().softmax(-1)[..., 1].cpu().numpy(), strict=True):
                probabilities[i] = row[: len(windows["input_ids"][i])]
        parts: list[list[_SubTokens]] = [[] for _ in texts]
        for i, text in enumerate(windows["overflow_to_sample_mapping"]):
            is_text = np.array(windows["special_tokens_mask"][i]) == 0
            spans = np.array(windows["offset_mapping"][i])[is_text]
            parts[text].append(_SubTokens(spans[:, 0], spans[:, 1], probabilities[i][is_text]))
        return [_SubTokens(*map(np.concatenate, zip(*part, strict=True))) for part in parts]


class _SubTokens(NamedTuple):
    """s sub-tokens of one text, in order: characters [start, end) and the probability to be kept."""

    starts: np.ndarray  # [s] int64
    ends: np.ndarray  # [s] int64
    probabilities: np.ndarray  # [s]


def _overlap_means(spans: np.ndarray, sub_tokens: _SubTokens) -> np.ndarray:  # [r, 2] -> [r]
    first = np.searchsorted(sub_tokens.ends, spans[:, 0], side="right")
    last = np.searchsorted(sub_tokens.starts, spans[:, 1], side="left")
    sums = np.concatenate([[0.0], sub_tokens.probabilities.cumsum(dtype=np.float64)])
    counts = np.maximum(last - first, 0)
    return np.where(counts > 0, sums[np.maximum(last, first)] - sums[first], 0.0) / np.maximum(counts, 1)
