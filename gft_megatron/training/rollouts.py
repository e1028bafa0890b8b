"""One rollout on all ranks: draw prompts, collect groups where there is an engine, gather them everywhere."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from gft_megatron.data.order import PromptOrder
from gft_megatron.data.store import PromptStore
from gft_megatron.groups import Batch, Group, Source
from gft_megatron.rewriting import Place, RewrittenPrompts
from gft_megatron.rollout.collect import CollectCounts, Collector, GroupRecipe
from gft_megatron.rollout.engine import Completion, FinishReason, SamplingParams
from gft_megatron.rollout.figures import evaluation_figures, evaluation_sums
from gft_megatron.training.exchange import gather_batch, max_over_ranks, sum_over_ranks
from gft_megatron.training.parallel import is_replica_leader

_FRUITLESS_ROUNDS = 10


@dataclass(frozen=True)
class Rollout:
    """The groups of one rollout, equal on every rank but for `own_groups`."""

    trained: Batch
    """What the optimizer steps divide between them."""
    collected: Batch
    """All of it, groups without variance included."""
    counts: CollectCounts
    own_groups: list[Group]
    """What this rank collected itself: for showing samples."""


class RolloutWorkers:
    """The collectors of all ranks. Every method is a collective over the world."""

    def __init__(self, collector: Collector | None, scope: str) -> None:
        """
        Args:
            collector: of this rank; None where it has no engine.
            scope: `RolloutEngine.scope`: on which ranks the engines are.
        """
        self._collector = collector
        self._engine = None if collector is None else collector.engine
        self._version = -1
        # Not asyncio.Runner: restoring SIGINT's handler after each call makes it print the call's whole result.
        self._loop = asyncio.new_event_loop()
        if scope == "rank":
            self._index, self._size = dist.get_rank(), dist.get_world_size()
        else:
            self._size = parallel_state.get_data_parallel_world_size()
            self._index = parallel_state.get_data_parallel_rank() if is_replica_leader() else -1

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand the weights to every engine. Gathering them takes all ranks, with an engine or without."""
        if version == self._version:  # known to every rank alike: the next lines are a collective
            return
        self._version = version
        if self._engine is None:
            for _ in named_tensors:
                pass
        else:
            self._loop.run_until_complete(self._engine.update_weights(named_tensors, version))

    def collect(
        self,
        store: PromptStore | RewrittenPrompts,
        order: PromptOrder,
        recipe: GroupRecipe,
        *,
        num_groups: int,
        skip_zero_variance: bool,
        mask_truncated: bool,
        refill: bool,
        rollout_id: int,
    ) -> Rollout:
        """Draw `num_groups` prompts and make their groups.

        Args:
            skip_zero_variance: leave out groups whose advantages are all 0.
            mask_truncated: leave out own samples that did not end; their rewards still count in their groups.
            refill: draw more prompts until `num_groups` groups are left.

        Raises:
            ValueError: round after round no group was left to train on.
        """
        collected = Batch.from_groups([], [])
        counts = CollectCounts()
        own_groups: list[Group] = []
        drawn = most_kept = fruitless = 0
        while fruitless < _FRUITLESS_ROUNDS:
            trained = trained_part(collected, skip_zero_variance=skip_zero_variance, mask_truncated=mask_truncated)
            kept = trained.num_groups
            if kept >= (num_groups if refill else 1):
                return Rollout(trained, collected, counts, own_groups)
            fruitless = 0 if kept > most_kept else fruitless + 1
            most_kept = kept
            rows = order.take(num_groups - kept if refill else num_groups)
            groups, batch, round_counts = self._collect_share(
                store, rows, recipe, first_id=drawn, rollout_id=rollout_id
            )
            drawn += len(rows)
            collected = Batch.cat([collected, batch])
            counts.add(round_counts)
            own_groups += groups
        raise ValueError(
            f"{drawn} prompts gave {kept} groups to train on: {collected.num_groups - kept} had equal rewards, "
            f"{counts.dropped_groups} lost their samples ({counts.failed_samples} failed to generate, "
            f"{counts.reward_errors} to score). Check --rm-type against the data, or start from a model that "
            f"solves some of the prompts"
        )

    def _collect_share(
        self,
        store: PromptStore | RewrittenPrompts,
        rows: list[int],
        recipe: GroupRecipe,
        *,
        first_id: int,
        rollout_id: int,
    ) -> tuple[list[Group], Batch, CollectCounts]:
        groups: list[Group] = []
        mine = Batch.from_groups([], [])
        counts = CollectCounts()
        if self._collector is not None:
            share = range(self._index, len(rows), self._size)
            prompts = [store[rows[i]] for i in share]
            groups, mine, counts = self._loop.run_until_complete(
                self._collector.collect(prompts, [first_id + i for i in share], recipe, rollout_id=rollout_id)
            )
        *sums, generate_sec, reward_sec = astuple(counts)
        total = CollectCounts(*map(int, sum_over_ranks(sums)), *max_over_ranks([generate_sec, reward_sec]))
        return groups, gather_batch(mine), total

    def rewrite(
        self, store: PromptStore, places: list[Place], sampling: SamplingParams, *, name: str
    ) -> list[np.ndarray | None]:
        """The policy's own response for each place; None where it was empty, did not end, or did not come."""
        mine: list[tuple[int, np.ndarray | None]] = []
        if self._collector is not None:
            share = range(self._index, len(places), self._size)
            completions = self._loop.run_until_complete(
                self._collector.draw(
                    [store[places[i][0]] for i in share],
                    sampling,
                    names=[f"{name}/{places[i][0]}/{places[i][1]}" for i in share],
                )
            )
            mine = [(i, _finished(completion)) for i, completion in zip(share, completions, strict=True)]
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, mine)
        found = dict(pair for part in everybody for pair in part)
        return [found[i] for i in range(len(places))]

    def evaluate(
        self, store: PromptStore, sampling: SamplingParams, *, num_samples: int, name: str
    ) -> dict[str, float]:
        """`evaluation_figures` of `num_samples` samples of each prompt."""
        sums = evaluation_sums([])
        if self._collector is not None:
            prompts = [store[i] for i in range(self._index, len(store), self._size)]
            samples = self._loop.run_until_complete(self._collector.sample(prompts, num_samples, sampling, name=name))
            sums = evaluation_sums(samples)
        return evaluation_figures(sum_over_ranks(sums), num_samples)

    def close(self) -> None:
        if self._engine is not None:
            self._loop.run_until_complete(self._engine.close())
        if self._collector is not None:
            self._loop.run_until_complete(self._collector.reward.close())
        self._loop.close()


def trained_part(
    batch: Batch, *, skip_zero_variance: bool, mask_truncated: bool, advantages: Tensor | None = None
) -> Batch:
    """The samples that are trained on; see `RolloutWorkers.collect`.

    Args:
        advantages: [n], what groups are judged by; default: the batch's own.
    """
    kept = torch.ones(batch.num_samples, dtype=torch.bool)
    if skip_zero_variance:
        kept &= _has_variance(batch.group_ids, batch.advantages if advantages is None else advantages)
    if mask_truncated:
        kept &= ~batch.truncated
    return batch.select(kept.nonzero()[:, 0].tolist())


def _finished(completion: Completion | None) -> np.ndarray | None:  # [response length] int64
    if completion is None or completion.finish_reason is not FinishReason.STOP or len(completion.token_ids) < 2:
        return None
    return completion.token_ids.astype(np.int64)


def _has_variance(group_ids: Tensor, advantages: Tensor) -> Tensor:  # [n], [n] -> [n] bool
    """The samples of groups in which some advantage is not 0."""
    return torch.isin(group_ids, group_ids[advantages != 0].unique())


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Rewards and lengths by source, and what was skipped, dropped or refilled."""
    batch, counts = rollout.collected, rollout.counts
    unequal = batch.group_ids[_has_variance(batch.group_ids, batch.advantages)]
    metrics = {
        "zero_std_frac": 1 - unequal.unique().numel() / max(batch.num_groups, 1),
        "groups_skipped": float(batch.num_groups - rollout.trained.num_groups),
        "groups_dropped": float(counts.dropped_groups),
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
    metrics["reward_mean"] = float(batch.rewards.double().mean()) if batch.num_samples else math.nan
    return {f"rollout/{name}": value for name, value in metrics.items() if not math.isnan(value)}
