"""One rollout on all ranks: draw prompts, collect groups where there is an engine, gather them everywhere.

Groups are collected in a background thread of the ranks that have an engine, so the next rollout may be drawn while
this one is trained on. What all ranks have to agree on (which rows are drawn, which groups are left for later) is known
to all of them alike.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from gft_megatron.data.order import PromptOrder
from gft_megatron.data.store import PromptStore
from gft_megatron.groups import Batch, Group, GroupKey, Sample, Source
from gft_megatron.observe.metrics import Rates
from gft_megatron.rewriting import Place, RewrittenPrompts
from gft_megatron.rollout.background import BackgroundLoop
from gft_megatron.rollout.collect import Collected, Collector, Draw, Enough
from gft_megatron.rollout.counts import CollectCounts, CollectNews
from gft_megatron.rollout.engine import Completion, FinishReason, SamplingParams
from gft_megatron.rollout.figures import evaluation_figures, evaluation_sums
from gft_megatron.rollout.recipe import GroupRecipe, RolloutRules
from gft_megatron.training.exchange import all_or_none, gather_batch, max_over_ranks, sum_over_ranks
from gft_megatron.training.parallel import is_replica_leader

_LONGEST_STALENESS = 100
_logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class _Round:
    """Draws that were handed out, and what this rank will have of them."""

    rollout_id: int
    draws: tuple[Draw, ...]
    """Of all ranks."""
    mine: Future[Collected] | None
    """None where there is no engine."""


@dataclass(frozen=True, order=True)
class _Left:
    """A draw that was begun by a collector and left for a later rollout."""

    key: GroupKey
    row: int
    owner: int
    """Which of the collectors; it may hold a part of the group."""


class RolloutWorkers:
    """The collectors of all ranks. Every method is a collective over the world."""

    def __init__(
        self,
        collector: Collector | None,
        scope: str,
        *,
        loop: BackgroundLoop | None = None,
        watch: Callable[[CollectNews, Mapping[str, float]], None] | None = None,
    ) -> None:
        """
        Args:
            collector: of this rank; None where it has no engine.
            scope: `RolloutEngine.scope`: on which ranks the engines are.
            loop: where the collector's engine lives; its owner is this object from now on.
            watch: told a few times a second where the collection is that this rank waits for, and the figures of its
                engine.
        """
        self._collector = collector
        self._engine = None if collector is None else collector.maker.engine
        self._bank = None if collector is None else collector.bank
        self._loop = loop or BackgroundLoop()
        self._watch = watch
        self._rates = Rates()
        self._version = -1
        self._trained_versions: list[int] = []
        self._rollout_id = 0
        """The rollout whose turn it is, or was last."""
        self._ahead: deque[_Round] = deque()
        self._planned: deque[tuple[int, tuple[tuple[GroupKey, int], ...]]] = deque()
        """Rollouts that a run before this one had begun, with their draws."""
        self._left: list[_Left] = []
        self._owners: dict[GroupKey, int] = {}
        """Which collector holds parts of the draws that were left before and are taken up again now."""
        if scope == "rank":
            self._index, self._size = dist.get_rank(), dist.get_world_size()
        else:
            self._size = parallel_state.get_data_parallel_world_size()
            self._index = parallel_state.get_data_parallel_rank() if is_replica_leader() else -1

    @property
    def num_ahead(self) -> int:
        """Rollouts that are being collected before their turn."""
        return len(self._ahead)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand the weights to every engine. Gathering them takes all ranks, with an engine or without."""
        if version == self._version:  # known to every rank alike: the next lines are a collective
            return
        self._version = version

        def hand_over() -> None:
            if self._engine is None:
                for _ in named_tensors:
                    pass
            else:
                self._loop.run(self._engine.update_weights(named_tensors, version))

        all_or_none(hand_over)

    def release_memory(self) -> None:
        """Have servers on the trainer's GPUs free their memory until the next weights."""
        all_or_none(lambda: None if self._engine is None else self._loop.run(self._engine.release_memory()))

    def start(
        self,
        prompts: PromptStore | RewrittenPrompts,
        order: PromptOrder,
        recipe: GroupRecipe,
        rules: RolloutRules,
        *,
        rollout_id: int,
    ) -> None:
        """Begin to collect a rollout. `collect` with the same number waits for it; the order of calls is theirs."""
        self._ahead.append(self._first_round(prompts, order, recipe, rules, rollout_id))

    def collect(
        self,
        prompts: PromptStore | RewrittenPrompts,
        order: PromptOrder,
        recipe: GroupRecipe,
        rules: RolloutRules,
        *,
        rollout_id: int,
        version: int,
    ) -> Rollout:
        """The groups of a rollout, begun by `start` or now.

        Args:
            version: of the weights that will be trained on it.

        Raises:
            ValueError: of all the prompts that may be drawn, no group was left to train on.
        """
        collected = Batch.from_groups([], [])
        counts = CollectCounts()
        own_groups: list[Group] = []
        own_keys: list[GroupKey] = []
        known = [v for v in self._trained_versions if v < version]
        self._trained_versions = [*known[-_LONGEST_STALENESS:], version]
        self._rollout_id = rollout_id
        if self._ahead and self._ahead[0].rollout_id == rollout_id:
            round_ = self._ahead.popleft()
        else:
            round_ = self._first_round(prompts, order, recipe, rules, rollout_id)
        drawn = 0
        while True:
            groups, keys, batch, round_counts = self._finish(round_, rules)
            drawn += len(round_.draws)
            collected = Batch.cat([collected, batch])
            counts.add(round_counts)
            own_groups += groups
            own_keys += keys
            trained = trained_part(
                collected, skip_zero_variance=rules.skip_zero_variance, mask_truncated=rules.mask_truncated
            )
            kept = trained.num_groups
            if kept >= (rules.num_groups if rules.refill else 1):
                break
            wanted = rules.num_groups - kept if rules.refill else rules.num_groups
            if (wanted := min(wanted, rules.most_draws - drawn)) <= 0:
                break
            draws = self._take(order, rollout_id, wanted, first_id=drawn)
            round_ = self._begin(prompts, recipe, rules, rollout_id, draws)
        if not kept:
            raise ValueError(
                f"{drawn} prompts gave no group to train on: {collected.num_groups} had equal rewards, "
                f"{counts.dropped_groups} lost a sample ({counts.failed_samples} failed to generate, "
                f"{counts.reward_errors} to score), {counts.stale_groups} were too old. Check --rm-type against the "
                f"data, or start from a model that solves some of the prompts"
            )
        if rules.refill and kept < rules.num_groups:
            _logger.warning("%d prompts gave %d groups of the %d that were wanted", drawn, kept, rules.num_groups)
        staleness = self._staleness(collected)
        return Rollout(trained, collected, staleness, counts, own_groups, own_keys)

    def engine_figures(self) -> dict[str, float]:
        """What this rank's engine has to tell; tokens a second since the call before."""
        figures = self._loop.run(self._figures())
        tokens = {name: value for name, value in figures.items() if name.startswith("tokens/")}
        speeds = {name.replace("tokens/", "tokens_per_sec/"): x for name, x in self._rates.of(tokens).items()}
        return {f"engine/{name}": x for name, x in {**figures, **speeds}.items() if name not in tokens}

    def mark_trained(self, rollout: Rollout, iteration: int) -> None:
        """Write down that the groups of a rollout were trained on, the last time in this step."""
        if self._bank is not None:
            self._bank.mark_consumed(rollout.own_keys, iteration)

    def compact(self, oldest_checkpoint: int) -> None:
        """Forget groups that no checkpoint could ask for again."""
        if self._bank is not None:
            self._bank.compact(oldest_checkpoint)

    def at_rest(self) -> AbstractContextManager[None]:
        """Nothing is collected meanwhile. A checkpoint's writer forks, and a lock that another thread holds at that
        moment would be held in the child for ever."""
        return self._loop.at_rest()

    def discard_ahead(self) -> None:
        """Stop what is being collected before its turn, and forget it: its phase, or the run, is over."""
        for round_ in self._ahead:
            if round_.mine is not None:
                round_.mine.cancel()
        self._ahead.clear()
        self._planned.clear()

    def state_dict(self) -> dict[str, Any]:
        """What has been drawn of the order and not been trained on."""
        ahead = [
            [round_.rollout_id, [[draw.key.rollout_id, draw.key.group_id, draw.row] for draw in round_.draws]]
            for round_ in self._ahead
        ]
        left = [[left.key.rollout_id, left.key.group_id, left.row] for left in self._left]
        return {"ahead": ahead, "left": left, "trained_versions": self._trained_versions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._planned = deque(
            (rollout_id, tuple((GroupKey(first, number), row) for first, number, row in draws))
            for rollout_id, draws in state["ahead"]
        )
        # Nobody holds a part of these any more.
        self._left = [
            _Left(GroupKey(first, number), row, i % self._size) for i, (first, number, row) in enumerate(state["left"])
        ]
        self._trained_versions = state["trained_versions"]

    def rewrite(
        self, store: PromptStore, places: list[Place], sampling: SamplingParams, *, name: str
    ) -> list[np.ndarray | None]:
        """The policy's own response for each place; None where it was empty, did not end, or did not come."""
        share = range(0)
        if self._collector is not None:
            share = range(self._index, len(places), self._size)
            drawing = self._collector.draw(
                [store[places[i][0]] for i in share],
                sampling,
                names=[f"{name}/{places[i][0]}/{places[i][1]}" for i in share],
            )
        completions = all_or_none(lambda: [] if self._collector is None else self._loop.run(drawing))
        mine = [(i, _finished(completion)) for i, completion in zip(share, completions, strict=True)]
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, mine)
        found = dict(pair for part in everybody for pair in part)
        return [found[i] for i in range(len(places))]

    def evaluate(
        self, store: PromptStore, sampling: SamplingParams, *, num_samples: int, name: str
    ) -> dict[str, float]:
        """`evaluation_figures` of `num_samples` samples of each prompt."""

        def draw() -> list[list[Sample]]:
            if self._collector is None:
                return []
            prompts = [store[i] for i in range(self._index, len(store), self._size)]
            return self._loop.run(self._collector.sample(prompts, num_samples, sampling, name=name))

        return evaluation_figures(sum_over_ranks(evaluation_sums(all_or_none(draw))), num_samples)

    def close(self) -> None:
        self.discard_ahead()
        if self._engine is not None:
            self._loop.run(self._engine.close())
        if self._collector is not None:
            self._loop.run(self._collector.maker.reward.close())
            if self._bank is not None:
                self._bank.close()
        self._loop.close()

    def _first_round(
        self,
        prompts: PromptStore | RewrittenPrompts,
        order: PromptOrder,
        recipe: GroupRecipe,
        rules: RolloutRules,
        rollout_id: int,
    ) -> _Round:
        """With what earlier rollouts left, before anything new."""
        if self._planned and self._planned[0][0] == rollout_id:
            _, draws = self._planned.popleft()
            return self._begin(prompts, recipe, rules, rollout_id, _numbered(draws))
        return self._begin(prompts, recipe, rules, rollout_id, self._take(order, rollout_id, rules.num_draws))

    def _take(self, order: PromptOrder, rollout_id: int, number: int, first_id: int = 0) -> list[Draw]:
        """What was left, before anything new."""
        left, self._left = self._left[:number], self._left[number:]
        self._owners = {draw.key: draw.owner for draw in left}
        fresh = enumerate(order.take(number - len(left)), first_id)
        return _numbered(
            [*((draw.key, draw.row) for draw in left), *((GroupKey(rollout_id, i), row) for i, row in fresh)], first_id
        )

    def _begin(
        self,
        prompts: PromptStore | RewrittenPrompts,
        recipe: GroupRecipe,
        rules: RolloutRules,
        rollout_id: int,
        draws: list[Draw],
    ) -> _Round:
        mine = None
        if self._collector is not None:
            owner_of = self._owners.get
            share = [draw for i, draw in enumerate(draws) if owner_of(draw.key, i % self._size) == self._index]
            enough = None
            if rules.is_over_sampling:
                enough = Enough(
                    (rules.num_groups + self._size - 1 - self._index) // self._size, rules.skip_zero_variance
                )
            mine = self._loop.submit(
                self._collector.collect(
                    prompts,
                    share,
                    recipe,
                    enough=enough,
                    keep_partial=rules.keep_partial,
                    oldest_version=self._oldest_version(rules.max_staleness, rollout_id),
                )
            )
        return _Round(rollout_id, tuple(draws), mine)

    def _finish(self, round_: _Round, rules: RolloutRules) -> tuple[list[Group], list[GroupKey], Batch, CollectCounts]:
        groups: list[Group] = []
        keys: list[GroupKey] = []
        batch = Batch.from_groups([], [])
        counts = CollectCounts()
        left: list[_Left] = []
        mine = all_or_none(lambda: None if round_.mine is None else self._loop.wait(round_.mine, self._tell))
        if mine is not None:
            groups, keys, batch, counts = mine.groups, mine.keys, mine.batch, mine.counts
            left = [_Left(draw.key, draw.row, self._index) for draw in mine.left]
            groups, batch = self._without_stale(groups, keys, batch, counts, rules)
        *sums, generate_sec, reward_sec = astuple(counts)
        total = CollectCounts(*map(int, sum_over_ranks(sums)), *max_over_ranks([generate_sec, reward_sec]))
        if rules.is_over_sampling:
            everybody: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everybody, left)
            self._left = sorted([*self._left, *(entry for part in everybody for entry in part)])
        return groups, keys, gather_batch(batch), total

    def _without_stale(
        self, groups: list[Group], keys: list[GroupKey], batch: Batch, counts: CollectCounts, rules: RolloutRules
    ) -> tuple[list[Group], Batch]:
        stale = self._staleness(batch) > rules.max_staleness  # [n]
        ids = batch.group_ids.unique_consecutive()
        kept = ~torch.isin(ids, batch.group_ids[stale])  # [groups]
        counts.stale_groups += int((~kept).sum())
        if self._bank is not None:
            self._bank.mark_dropped(
                {
                    key: "its weights were too old"
                    for key, is_kept in zip(keys, kept.tolist(), strict=True)
                    if not is_kept
                }
            )
        of_kept = torch.isin(batch.group_ids, ids[kept])
        return (
            [group for group, is_kept in zip(groups, kept.tolist(), strict=True) if is_kept],
            batch.select(of_kept.nonzero()[:, 0].tolist()),
        )

    def _oldest_version(self, max_staleness: int, rollout_id: int) -> int:
        """Of the weights that tokens may be drawn with already, to be trained on in the turn of this rollout."""
        still_to_train = rollout_id - self._rollout_id
        trained_since = max_staleness - still_to_train
        if trained_since < 0:
            return self._version
        return self._trained_versions[-1 - trained_since] if trained_since < len(self._trained_versions) else -1

    def _staleness(self, batch: Batch) -> Tensor:  # [n] int64
        """Rollouts trained since the oldest token of each sample was drawn; 0 for recorded responses."""
        behind = [
            0 if version < 0 else len(self._trained_versions) - bisect_right(self._trained_versions, version)
            for version in batch.weight_versions.tolist()
        ]
        return torch.tensor(behind, dtype=torch.int64)

    def _tell(self) -> None:
        if self._watch is not None and self._collector is not None:
            self._watch(self._collector.news, self._loop.run(self._figures()))

    async def _figures(self) -> dict[str, float]:
        return {} if self._engine is None else self._engine.figures()


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


def _numbered(named_rows: Sequence[tuple[GroupKey, int]], first_id: int = 0) -> list[Draw]:
    return [Draw(key, i, row) for i, (key, row) in enumerate(named_rows, first_id)]


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
