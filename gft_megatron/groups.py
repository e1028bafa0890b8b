"""Every type that crosses a room: prompts, samples, groups, and the flat batch that training reads.

Nothing here imports Megatron or opens a socket. Token arrays are numpy while they are collected (cheap to build,
no device) and one set of flat tensors, `Batch`, once they are handed to the training ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Source(IntEnum):
    """Who wrote a response. The numbers are part of the public interface (`LossInputs.sources`)."""

    EXPERT = 0
    TEACHER = 1
    SELF = 2


@dataclass(frozen=True, slots=True)
class WeightSpan:
    """Tokens [start, end) of a response were sampled with weights of this version."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class RecordedResponse:
    """A response that came with the data: an expert's or a teacher's, tokenised, end-of-sequence token included."""

    text: str
    token_ids: np.ndarray  # [response length] int64
    source: Source
    token_groups: np.ndarray | None = None  # [response length] int64 >= 0, None where the data say nothing


@dataclass(frozen=True, slots=True)
class Prompt:
    """One validated data row."""

    row: int
    """Position among the accepted rows of the data set: the identity of the prompt in counters and checkpoints."""
    token_ids: np.ndarray  # [prompt length] int64
    label: str
    responses: tuple[RecordedResponse, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One response of a group, scored. A response that failed to generate or to score never becomes a Sample."""

    source: Source
    token_ids: np.ndarray  # [response length] int64
    text: str
    reward: float
    """NaN where the run needs no reward (SFT on recorded responses)."""
    truncated: bool = False
    rollout_log_probs: np.ndarray | None = None  # [response length] float32, NaN in a hint; None for recorded responses
    weight_spans: tuple[WeightSpan, ...] = ()
    response: int = -1
    """Which of the row's recorded responses it is; -1 for own samples."""
    token_groups: np.ndarray | None = None  # [response length] int64 >= 0, None where the data say nothing


@dataclass(frozen=True, slots=True, order=True)
class GroupKey:
    """The name of a group for good: its requests, its random choices and its place in the bank go by it."""

    rollout_id: int
    """The rollout that it was first drawn for."""
    group_id: int
    """Unique in that rollout."""


@dataclass(frozen=True, slots=True)
class Group:
    """All responses to one prompt."""

    prompt: Prompt
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Batch:
    """Samples as flat tensors: n samples, t tokens (prompt and response of every sample, one after the other)."""

    tokens: Tensor  # [t] int64
    rollout_log_probs: Tensor  # [t] float32, NaN where the sampler gave none (prompts, hints, recorded responses)
    token_groups: Tensor  # [t] int64, -1 where unknown (prompts, own samples, responses without scores)
    lengths: Tensor  # [n] int64, prompt + response
    prompt_lengths: Tensor  # [n] int64
    group_ids: Tensor  # [n] int64, equal inside a group, unique in the batch
    sources: Tensor  # [n] int64, see Source
    rewards: Tensor  # [n] float32, NaN where the run needs none
    advantages: Tensor  # [n] float32
    truncated: Tensor  # [n] bool
    weight_versions: Tensor  # [n] int64, oldest version a token was sampled with; -1 for recorded responses
    rows: Tensor  # [n] int64, see Prompt.row
    responses: Tensor  # [n] int64, see Sample.response

    @property
    def num_samples(self) -> int:
        return self.lengths.numel()

    @property
    def num_groups(self) -> int:
        return self.group_ids.unique().numel()

    @property
    def num_response_tokens(self) -> int:
        return int(self.lengths.sum() - self.prompt_lengths.sum())

    @staticmethod
    def from_groups(groups: Sequence[Group], group_ids: Sequence[int]) -> Batch:
        """Flatten groups with distinct ids. Advantages are 0 until somebody compares the rewards."""
        tokens: list[np.ndarray] = [np.zeros(0, np.int64)]
        log_probs: list[np.ndarray] = [np.zeros(0, np.float32)]
        token_groups: list[np.ndarray] = [np.zeros(0, np.int64)]
        columns: dict[str, list[float | int | bool]] = {name: [] for name in _SAMPLE_COLUMNS}
        for group_id, group in zip(group_ids, groups, strict=True):
            prompt = group.prompt.token_ids
            for sample in group.samples:
                tokens += [prompt, sample.token_ids]
                log_probs += _with_prompt(sample.rollout_log_probs, np.float32(np.nan), prompt, sample.token_ids)
                token_groups += _with_prompt(sample.token_groups, np.int64(-1), prompt, sample.token_ids)
                columns["lengths"].append(len(prompt) + len(sample.token_ids))
                columns["prompt_lengths"].append(len(prompt))
                columns["group_ids"].append(group_id)
                columns["sources"].append(int(sample.source))
                columns["rewards"].append(sample.reward)
                columns["advantages"].append(0.0)
                columns["truncated"].append(sample.truncated)
                columns["weight_versions"].append(min((span.version for span in sample.weight_spans), default=-1))
                columns["rows"].append(group.prompt.row)
                columns["responses"].append(sample.response)
        return Batch(
            tokens=torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
            rollout_log_probs=torch.from_numpy(np.concatenate(log_probs).astype(np.float32)),
            token_groups=torch.from_numpy(np.concatenate(token_groups)),
            **{name: torch.tensor(values, dtype=_SAMPLE_COLUMNS[name]) for name, values in columns.items()},
        )

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        """Join batches whose group ids are already unique across them."""
        return Batch(**{f.name: torch.cat([getattr(batch, f.name) for batch in batches]) for f in fields(Batch)})

    def select(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`, in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        ends = self.lengths.cumsum(0)
        starts = ends - self.lengths
        spans = [slice(int(starts[i]), int(ends[i])) for i in index]
        empty = slice(0, 0)
        return Batch(
            **{name: torch.cat([getattr(self, name)[s] for s in (empty, *spans)]) for name in _TOKEN_COLUMNS},
            **{name: getattr(self, name)[index] for name in _SAMPLE_COLUMNS},
        )


def _with_prompt(
    known: np.ndarray | None, unknown: np.generic, prompt: np.ndarray, response: np.ndarray
) -> list[np.ndarray]:
    """What is known of each token, for the prompt and for the response."""
    return [np.full(len(prompt), unknown), np.full(len(response), unknown) if known is None else known]


_TOKEN_COLUMNS = ("tokens", "rollout_log_probs", "token_groups")
_SAMPLE_COLUMNS = {
    "lengths": torch.int64,
    "prompt_lengths": torch.int64,
    "group_ids": torch.int64,
    "sources": torch.int64,
    "rewards": torch.float32,
    "advantages": torch.float32,
    "truncated": torch.bool,
    "weight_versions": torch.int64,
    "rows": torch.int64,
    "responses": torch.int64,
}
