"""Excess loss (Rho-1, arXiv:2404.07965): a token matters that the reference model finds easier than the policy does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scoring.method import Pass, Response, Score
from scoring.models import ModelMethod, load_tokenizer, num_positions, padded_batches
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gft_megatron import vocab_parallel_log_probs


@dataclass(frozen=True, kw_only=True)
class Excess(ModelMethod):
    """Rho-1: -log p(token) of --hf-checkpoint minus that of --ref-hf-checkpoint, given prompt and tokens before."""

    ref_hf_checkpoint: str
    """Hugging Face folder of the reference model, with the same tokenizer."""

    @property
    def max_tokens(self) -> int | None:
        known = [num_positions(folder) for folder in (self.hf_checkpoint, self.ref_hf_checkpoint)]
        return min((length for length in known if length is not None), default=None)

    def scorer(self, tokenizer: PreTrainedTokenizerBase, responses: Pass) -> Score:
        other = load_tokenizer("--ref-hf-checkpoint", self.ref_hf_checkpoint)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"--ref-hf-checkpoint {self.ref_hf_checkpoint} has another tokenizer than --hf-checkpoint "
                f"{self.hf_checkpoint}: their tokens cannot be compared"
            )
        policy = self.load(AutoModelForCausalLM, "--hf-checkpoint", self.hf_checkpoint)
        reference = self.load(AutoModelForCausalLM, "--ref-hf-checkpoint", self.ref_hf_checkpoint)

        def score(responses: Sequence[Response]) -> list[np.ndarray]:
            scores: dict[int, np.ndarray] = {}
            for members, tokens in padded_batches(responses, self.tokens_per_pass):
                tokens = tokens.to(self.device)
                excess = (_log_probs(reference, tokens) - _log_probs(policy, tokens)).cpu().numpy()
                for row, i in zip(excess, members, strict=True):
                    first = len(responses[i].prompt_ids) - 1
                    scores[i] = row[first : first + len(responses[i].token_ids)]
            return [scores[i] for i in range(len(responses))]

        return score


@torch.no_grad()
def _log_probs(model: PreTrainedModel, tokens: Tensor) -> Tensor:  # [b, s] -> [b, s - 1]: of each but the first token
    logits = model(input_ids=tokens, use_cache=False).logits
    return vocab_parallel_log_probs(logits[:, :-1], tokens[:, 1:])[0]
