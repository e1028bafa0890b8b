"""One rollout on all ranks: draw prompts, collect groups where there is an engine, gather them everywhere.

Groups are collected in a background thread of the ranks that have an engine, so the next rollout may be drawn while
this one is trained on. What all ranks have to agree on (which rows are drawn, which groups are left for later) is known
to all of them alike.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from gft_megatron.data.order import PromptOrder
from gft_megatron.data.store import PromptStore
from gft_megatron.groups import Batch, Group, GroupKey, Sample
from gft_megatron.observe.metrics import Rates
from gft_megatron.rewriting import Place
from gft_megatron.rollout.background import BackgroundLoop
from gft_megatron.rollout.collect import Collected, Collector, Enough, Prompts
from gft_megatron.rollout.counts import CollectCounts, CollectNews
from gft_megatron.rollout.draws import Draw, DrawQueue
from gft_megatron.rollout.engine import Completion, FinishReason, SamplingParams, figures_of_all
from gft_megatron.rollout.figures import evaluation_figures, evaluation_sums
from gft_megatron.rollout.outcome import Rollout, trained_part
from gft_megatron.rollout.recipe import GroupRecipe, RolloutRules
from gft_megatron.rollout.staleness import TrainedVersions
from gft_megatron.training.exchange import all_or_none, gather_batch, max_over_ranks, sum_over_ranks
from gft_megatron.training.parallel import is_replica_leader

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RolloutPlan:
    """What a rollout is to be."""

    rollout_id: int
    prompts: Prompts
    order: PromptOrder
    """In which they are drawn; the plans of a run share it."""
    recipe: GroupRecipe
    rules: RolloutRules


@dataclass(frozen=True)
class _Round:
    """Draws that were handed out, and what this rank will have of them."""

    rollout_id: int
    draws: list[Draw]
    """Of all ranks."""
    news: CollectNews
    """Where this rank is with it."""
    mine: Future[Collected] | None
    """None where there is no engine."""


class RolloutWorkers:
    """The collectors of all ranks. Methods are collectives over the world, but for `at_rest`, `close` and the
    state."""

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
        self._trained = TrainedVersions()
        self._rollout_id = 0
        """The rollout whose turn it is, or was last."""
        self._ahead: deque[_Round] = deque()
        if scope == "rank":
            self._index, self._size = dist.get_rank(), dist.get_world_size()
        else:
            self._size = parallel_state.get_data_parallel_world_size()
            self._index = parallel_state.get_data_parallel_rank() if is_replica_leader() else -1
        self._queue = DrawQueue(self._size)

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

    def start(self, plan: RolloutPlan) -> None:
        """Begin to collect a rollout. `collect` with the same number waits for it; the order of calls is theirs."""
        self._ahead.append(self._first_round(plan))

    def collect(self, plan: RolloutPlan, *, version: int) -> Rollout:
        """The groups of a rollout, begun by `start` or now.

        Args:
            version: of the weights that will be trained on it.

        Raises:
            ValueError: of all the prompts that may be drawn, no group was left to train on.
        """
        rules = plan.rules
        collected = Batch.from_groups([], [])
        counts = CollectCounts()
        own_groups: list[Group] = []
        own_keys: list[GroupKey] = []
        self._trained.add(version)
        self._rollout_id = plan.rollout_id
        begun = self._ahead and self._ahead[0].rollout_id == plan.rollout_id
        round_ = self._ahead.popleft() if begun else self._first_round(plan)
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
            round_ = self._begin(plan, self._queue.more(plan.order, plan.rollout_id, wanted, first_id=drawn))
        if not kept:
            raise ValueError(
                f"{drawn} prompts gave no group to train on: {collected.num_groups} had equal rewards, "
                f"{counts.dropped_groups} lost a sample ({counts.failed_samples} failed to generate, "
                f"{counts.reward_errors} to score), {counts.stale_groups} were too old. Check --rm-type against the "
                f"data, or start from a model that solves some of the prompts"
            )
        if rules.refill and kept < rules.num_groups:
            _logger.warning("%d prompts gave %d groups of the %d that were wanted", drawn, kept, rules.num_groups)
        return Rollout(trained, collected, self._trained.staleness(collected), counts, own_groups, own_keys)

    def engine_figures(self) -> dict[str, float]:
        """What the engines of all ranks have to tell; tokens a second since the call before."""
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, self._loop.run(self._figures()))
        figures = figures_of_all(everybody)
        tokens = {name: value for name, value in figures.items() if name.startswith("tokens/")}
        speeds = {name.replace("tokens/", "tokens_per_sec/"): x for name, x in self._rates.of(tokens).items()}
        return {f"engine/{name}": x for name, x in {**figures, **speeds}.items() if name not in tokens}

    def mark_trained(self, rollout: Rollout, iteration: int) -> None:
        """Write down that the groups of a rollout were trained on, the last time in this step."""
        all_or_none(lambda: None if self._bank is None else self._bank.mark_consumed(rollout.own_keys, iteration))

    def compact(self, oldest_checkpoint: int) -> None:
        """Forget groups that no checkpoint could ask for again."""
        all_or_none(lambda: None if self._bank is None else self._bank.compact(oldest_checkpoint))

    def at_rest(self) -> AbstractContextManager[None]:
        """Nothing is collected meanwhile. A checkpoint's writer forks, and a lock that another thread holds at that
        moment would be held in the child for ever."""
        return self._loop.at_rest()

    def end_phase(self) -> None:
        """Forget what was begun for later rollouts: in the next phase groups may be made in another way."""
        self._discard_ahead()
        self._queue.forget_planned()
        own = [draw.key for draw in self._queue.give_back() if draw.owner == self._index]
        all_or_none(lambda: None if self._collector is None else self._loop.run(self._collector.give_up(own)))

    def state_dict(self) -> dict[str, Any]:
        """What has been drawn of the order and not been trained on."""
        ahead = ((round_.rollout_id, round_.draws) for round_ in self._ahead)
        return {**self._queue.state_dict(ahead), "trained_versions": self._trained.versions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._queue.load_state_dict(state)
        self._trained = TrainedVersions(state["trained_versions"])

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
        self._discard_ahead()
        if self._engine is not None:
            self._loop.run(self._engine.close())
        if self._collector is not None:
            self._loop.run(self._collector.maker.reward.close())
            if self._bank is not None:
                self._bank.close()
        self._loop.close()

    def _discard_ahead(self) -> None:
        for round_ in self._ahead:
            if round_.mine is not None:
                round_.mine.cancel()
        self._ahead.clear()

    def _first_round(self, plan: RolloutPlan) -> _Round:
        return self._begin(plan, self._queue.first(plan.order, plan.rollout_id, plan.rules.num_draws))

    def _begin(self, plan: RolloutPlan, draws: list[Draw]) -> _Round:
        news = CollectNews()
        if self._collector is None:
            return _Round(plan.rollout_id, draws, news, None)
        rules = plan.rules
        enough = None
        if rules.is_over_sampling:
            # Of all collectors together, num_groups.
            share = (rules.num_groups + self._size - 1 - self._index) // self._size
            enough = Enough(share, rules.skip_zero_variance)
        oldest_version = self._trained.oldest_allowed(
            rules.max_staleness, newest=self._version, rollouts_before=plan.rollout_id - self._rollout_id
        )
        collecting = self._collector.collect(
            plan.prompts,
            [draw for draw in draws if draw.owner == self._index],
            plan.recipe,
            enough=enough,
            keep_partial=rules.keep_partial,
            oldest_version=oldest_version,
            news=news,
        )
        return _Round(plan.rollout_id, draws, news, self._loop.submit(collecting))

    def _finish(self, round_: _Round, rules: RolloutRules) -> tuple[list[Group], list[GroupKey], Batch, CollectCounts]:
        mine = all_or_none(lambda: self._own_part(round_, rules))
        *sums, generate_sec, reward_sec = astuple(mine.counts)
        total = CollectCounts(*map(int, sum_over_ranks(sums)), *max_over_ranks([generate_sec, reward_sec]))
        if rules.is_over_sampling:
            everybody: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everybody, mine.left)
            self._queue.leave(draw for part in everybody for draw in part)
        return mine.groups, mine.keys, gather_batch(mine.batch), total

    def _own_part(self, round_: _Round, rules: RolloutRules) -> Collected:
        """What this rank has of a round, without groups that are too old; only the keys still tell of those."""
        if round_.mine is None:
            return Collected([], [], Batch.from_groups([], []), [], CollectCounts())
        mine = self._loop.wait(round_.mine, lambda: self._tell(round_.news))
        batch = mine.batch
        ids = batch.group_ids.unique_consecutive()
        stale = batch.group_ids[self._trained.staleness(batch) > rules.max_staleness]
        is_kept = (~torch.isin(ids, stale)).tolist()
        too_old = [key for key, kept in zip(mine.keys, is_kept, strict=True) if not kept]
        mine.counts.stale_groups += len(too_old)
        if self._bank is not None:
            self._bank.mark_dropped(dict.fromkeys(too_old, "its weights were too old"))
        return replace(
            mine,
            groups=[group for group, kept in zip(mine.groups, is_kept, strict=True) if kept],
            batch=batch.select((~torch.isin(batch.group_ids, stale)).nonzero()[:, 0].tolist()),
        )

    def _tell(self, news: CollectNews) -> None:
        if self._watch is not None:
            self._watch(news, self._loop.run(self._figures()))

    async def _figures(self) -> dict[str, float]:
        return {} if self._engine is None else self._engine.figures()


def _finished(completion: Completion | None) -> np.ndarray | None:  # [response length] int64
    if completion is None or completion.finish_reason is not FinishReason.STOP or len(completion.token_ids) < 2:
        return None
    return completion.token_ids.astype(np.int64)
