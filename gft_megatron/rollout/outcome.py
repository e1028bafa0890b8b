"""What a rollout brought: its groups, which of them are trained on, and its figures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gft_megatron.groups import Batch, Group, GroupKey, Source
from gft_megatron.rollout.counts import CollectCounts


@dataclass(frozen=True)
class Rollout:
    """The groups of one rollout, equal on every rank but for its own."""

    trained: Batch
    """What the optimizer steps divide between them."""
    collected: Batch
    """All of it, groups without variance included."""
    staleness: Tensor
    """[n] of `collected`: rollouts trained since a sample's oldest token was drawn."""
    counts: CollectCounts
    own_groups: list[Group]
    """What this rank collected itself: for showing samples."""
    own_keys: list[GroupKey]
    """Of these, and of those that were too old."""


def trained_part(
    batch: Batch, *, skip_zero_variance: bool, mask_truncated: bool, advantages: Tensor | None = None
) -> Batch:
    """The samples that are trained on; see `RolloutRules`.

    Args:
        advantages: [n], what groups are judged by; default: the batch's own.
    """
    kept = torch.ones(batch.num_samples, dtype=torch.bool)
    if skip_zero_variance:
        kept &= _has_variance(batch.group_ids, batch.advantages if advantages is None else advantages)
    if mask_truncated:
        kept &= ~batch.truncated
    return batch.select(kept.nonzero()[:, 0].tolist())


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Rewards and lengths by source, and what was skipped, dropped or refilled."""
    batch, counts = rollout.collected, rollout.counts
    unequal = batch.group_ids[_has_variance(batch.group_ids, batch.advantages)]
    metrics = {
        "zero_std_frac": 1 - unequal.unique().numel() / max(batch.num_groups, 1),
        "groups_skipped": float(batch.num_groups - rollout.trained.num_groups),
        "groups_dropped": float(counts.dropped_groups),
        "groups_restored": float(counts.restored_groups),
        "groups_stale": float(counts.stale_groups),
        "resumed_samples": float(counts.resumed_samples),
        "refilled_samples": float(counts.refilled_samples),
        "failed_samples": float(counts.failed_samples),
        "reward_errors": float(counts.reward_errors),
        "num_samples": float(batch.num_samples),
    }
    lengths = (batch.lengths - batch.prompt_lengths).double()
    for source in Source:
        of = batch.sources == source
        if of.any():
            metrics[f"response_length_mean_{source.name.lower()}"] = float(lengths[of].mean())
            metrics[f"reward_mean_{source.name.lower()}"] = float(batch.rewards[of].double().mean())
    own = batch.sources == Source.SELF
    if own.any():
        given = (batch.rollout_log_probs.isnan() & own.repeat_interleave(batch.lengths)).sum()  # prompts and hints
        if hinted := int(given - batch.prompt_lengths[own].sum()):
            metrics["hint_length_mean"] = hinted / int(own.sum())
        metrics["truncated_frac"] = float(batch.truncated[own].double().mean())
        metrics["staleness_mean"] = float(rollout.staleness[own].double().mean())
        metrics["staleness_max"] = float(rollout.staleness[own].max())
    metrics["reward_mean"] = float(batch.rewards.double().mean()) if batch.num_samples else math.nan
    return {f"rollout/{name}": value for name, value in metrics.items() if not math.isnan(value)}


def _has_variance(group_ids: Tensor, advantages: Tensor) -> Tensor:  # [n], [n] -> [n] bool
    """The samples of groups in which some advantage is not 0."""
    return torch.isin(group_ids, group_ids[advantages != 0].unique())
