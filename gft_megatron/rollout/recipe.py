"""What a group is made of, how its responses are compared, and how many groups a rollout has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gft_megatron.advantages import AdvantageNormalization, group_advantages
from gft_megatron.groups import Batch, Source
from gft_megatron.rollout.engine import SamplingParams
from gft_megatron.rollout.hints import Hints


@dataclass(frozen=True, kw_only=True)
class GroupRecipe:
    """What a group is made of. GFT's default is 1 + 3 + 4 (arXiv:2604.14258 Sec. 4.1)."""

    n_expert: int
    n_teacher: int
    n_self: int
    sampling: SamplingParams
    needs_advantages: bool
    """False for losses that weigh every response alike (SFT, DFT): all advantages are then 1."""
    advantage_normalization: AdvantageNormalization = "std"
    advantage_ddof: int = 1
    compare_own_source: bool = False
    """A response is compared with those of its own source only, not with all of its group."""
    overlong_buffer_len: int = 0
    """See `overlong_penalty`; 0: none."""
    hints: Hints | None = None
    """Own samples begin with a part of an expert's response; None: they do not."""

    @property
    def needs_rewards(self) -> bool:
        return self.needs_advantages or self.n_self > 0

    def shaped_rewards(self, batch: Batch) -> Tensor:  # [num_samples]
        """The rewards as advantages see them; elsewhere they are told as they are."""
        lengths = batch.lengths - batch.prompt_lengths
        penalty = overlong_penalty(lengths, longest=self.sampling.max_new_tokens, buffer=self.overlong_buffer_len)
        return batch.rewards + penalty.where(batch.sources == int(Source.SELF), 0.0)


@dataclass(frozen=True, kw_only=True)
class RolloutRules:
    """How many groups a rollout has, and which."""

    num_groups: int
    num_draws: int
    """Prompts that are begun at once; more than `num_groups` is over-sampling: drawing stops when enough are done."""
    skip_zero_variance: bool
    """Leave out groups whose advantages are all 0."""
    mask_truncated: bool
    """Leave out own samples that did not end; their rewards still count in their groups."""
    refill: bool
    """Draw more prompts until `num_groups` groups are left."""
    most_draws: int
    """Where refilling ends."""
    keep_partial: bool = False
    """Go on in the next rollout with samples that over-sampling stopped half-way, instead of starting anew."""
    max_staleness: int = 0
    """Rollouts trained since a group's oldest token was drawn; older ones are left out."""

    @property
    def is_over_sampling(self) -> bool:
        return self.num_draws > self.num_groups


def overlong_penalty(lengths: Tensor, *, longest: int, buffer: int) -> Tensor:  # [n] -> [n]
    """DAPO's soft overlong punishment (arXiv:2503.14476 Eq. 13): 0, falling to -1 over the last `buffer` tokens."""
    if not buffer:
        return torch.zeros(lengths.shape)
    return -((lengths - (longest - buffer)) / buffer).clamp(0.0, 1.0)


def recipe_advantages(rewards: Tensor, group_ids: Tensor, sources: Tensor, recipe: GroupRecipe) -> Tensor:
    """Advantages of samples, [n] each; 1 for a loss that weighs every response alike."""
    if not recipe.needs_advantages:
        return torch.ones(len(rewards))
    compared = group_ids * len(Source) + sources if recipe.compare_own_source else group_ids
    return group_advantages(rewards, compared, normalize=recipe.advantage_normalization, ddof=recipe.advantage_ddof)
