"""Semantic clusters: tokens are in one group whose hidden states are near each other."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scoring.kmeans import k_means, nearest_center
from scoring.method import Pass, Response, Score
from scoring.models import ModelMethod, num_positions, padded_batches
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from gft_megatron.data.rows import MAX_TOKEN_GROUPS

_TOKENS_OF_A_RESPONSE = 16


@dataclass(frozen=True, kw_only=True)
class Cluster(ModelMethod):
    """Semantics without a second model: k-means of the hidden states of --hf-checkpoint, each cluster a group.

    A token's state is the last layer's at the token's own place, after prompt and tokens before, of length 1. The
    centers are found on a random sample of the responses; then every token of the data gets the nearest.
    """

    num_clusters: int = 8
    """Groups."""
    fit_responses: int = 2000
    """Responses in which the centers are looked for, at most 16 tokens of each."""
    seed: int = 1234
    """Of the sample and of the first centers."""

    key: ClassVar[Literal["token_scores", "token_groups"]] = "token_groups"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.num_clusters <= MAX_TOKEN_GROUPS:
            raise ValueError(f"--num-clusters is {self.num_clusters}; it has to be 2 to {MAX_TOKEN_GROUPS}")
        if self.fit_responses < 1:
            raise ValueError(f"--fit-responses is {self.fit_responses}; it has to be at least 1")

    @property
    def max_tokens(self) -> int | None:
        return num_positions(self.hf_checkpoint)

    def scorer(self, tokenizer: PreTrainedTokenizerBase, responses: Pass) -> Score:
        model = self.load(AutoModel, "--hf-checkpoint", self.hf_checkpoint)
        generator = torch.Generator().manual_seed(self.seed)
        sample = []
        for _, states in self._states(model, self._draw(responses)):
            chosen = torch.randperm(len(states), generator=generator)[:_TOKENS_OF_A_RESPONSE]
            sample.append(states[chosen.to(states.device)].cpu())
        if not sample:
            raise ValueError(f"{self.input} has no recorded response to score")
        centers = k_means(torch.cat(sample), self.num_clusters, generator).to(self.device)

        def score(responses: Sequence[Response]) -> list[np.ndarray]:
            groups = {i: nearest_center(states, centers).cpu().numpy() for i, states in self._states(model, responses)}
            return [groups[i] for i in range(len(responses))]

        return score

    def _draw(self, responses: Pass) -> list[Response]:
        """A uniform sample of all responses."""
        rng = random.Random(self.seed)
        numbered = enumerate(response for chunk in responses("drawing a sample") for response in chunk)
        # The number keeps responses from being compared.
        keyed = ((rng.random(), number, response) for number, response in numbered)
        return [response for *_, response in heapq.nsmallest(self.fit_responses, keyed)]

    def _states(self, model: PreTrainedModel, responses: Sequence[Response]) -> Iterator[tuple[int, Tensor]]:
        """Index of a response and the states [r, h] of its tokens, in any order of the responses."""
        for members, tokens in padded_batches(responses, self.tokens_per_pass):
            with torch.no_grad():
                hidden = model(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state  # [b, s, h]
            for row, i in zip(hidden, members, strict=True):
                first = len(responses[i].prompt_ids)
                yield i, F.normalize(row[first : first + len(responses[i].token_ids)].float(), dim=-1)
