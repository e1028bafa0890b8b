"""From prompts to scored groups: recorded responses, own samples, rewards, advantages.

Nothing false becomes a sample: a group is complete or absent, and one that is absent is counted. Nothing finished is
lost: a group is in the bank before anybody else hears of it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from gft_megatron.groups import Batch, Group, GroupKey, Prompt, RecordedResponse, Sample, Source
from gft_megatron.rewards import RewardError
from gft_megatron.rollout.bank import Bank
from gft_megatron.rollout.counts import CollectCounts, CollectNews
from gft_megatron.rollout.draws import Draw
from gft_megatron.rollout.engine import Completion, Partial, RolloutError, SamplingParams
from gft_megatron.rollout.hints import NO_HINT, draw_hint
from gft_megatron.rollout.recipe import GroupRecipe, recipe_advantages
from gft_megatron.rollout.samples import NOTHING_DRAWN, Round, SampleMaker

_logger = logging.getLogger(__name__)


class Prompts(Protocol):
    """Rows of the data, read when they are asked for."""

    def __getitem__(self, row: int, /) -> Prompt: ...


@dataclass(frozen=True, slots=True)
class Enough:
    """When to stop drawing."""

    num_groups: int
    skip_zero_variance: bool
    """Groups whose advantages are all 0 do not count."""


@dataclass(frozen=True)
class Collected:
    """What came of some draws, in their order."""

    groups: list[Group]
    keys: list[GroupKey]
    batch: Batch
    """The groups, flat, with advantages."""
    left: list[Draw]
    """What was not needed any more, begun or not, or even finished."""
    counts: CollectCounts


@dataclass(frozen=True)
class _Begun:
    """Own samples of a group, whole or not, each with the hint that it was drawn behind."""

    samples: list[Sample | Partial]
    hints: list[np.ndarray]


@dataclass
class Collector:
    """Makes groups of prompts. One lives on every rank that has an engine."""

    maker: SampleMaker
    bank: Bank | None = None
    """None where no sample is drawn: recorded responses are in the data."""
    _begun: dict[GroupKey, _Begun] = field(default_factory=dict)
    """Groups that were stopped half-way."""
    _spare: dict[GroupKey, Group] = field(default_factory=dict)
    """Groups that were finished when there were enough already."""
    _warned: bool = False

    async def collect(
        self,
        prompts: Prompts,
        draws: Sequence[Draw],
        recipe: GroupRecipe,
        *,
        enough: Enough | None = None,
        keep_partial: bool = False,
        oldest_version: int = -1,
        news: CollectNews | None = None,
    ) -> Collected:
        """Make the groups of `draws`, all or until there are enough.

        Args:
            draws: with ids that are distinct over all collectors of this rollout.
            keep_partial: a later rollout goes on with what was drawn of groups that were left; else it starts anew.
            oldest_version: groups that were left, and have tokens of older weights, are drawn anew.
            news: kept up to date, for others to look at.
        """
        round_ = Round(is_stopping=enough is not None and enough.num_groups == 0)
        news = news or CollectNews()
        news.num_draws = len(draws)
        self._forget_older(oldest_version)
        stored = self._stored(draws) | self._spare.keys()
        # No more of them can have a request with the engine; the rest of the queue is numbers only.
        most_in_flight = self.maker.max_concurrent_samples
        todo = iter(draws)
        ended: asyncio.Queue[asyncio.Task[Group | None]] = asyncio.Queue()
        running: dict[asyncio.Task[Group | None], Draw] = {}
        made: list[tuple[Draw, Group]] = []
        left: list[Draw] = []
        num_useful = 0
        try:
            while True:
                while not round_.is_stopping and len(running) < most_in_flight and (draw := next(todo, None)):
                    group = self._group(prompts[draw.row], draw.key, recipe, round_, stored, keep_partial)
                    task = asyncio.create_task(group)
                    task.add_done_callback(ended.put_nowait)
                    running[task] = draw
                news.num_in_flight = len(running)
                if not running:
                    break
                done = [await ended.get()]
                while not ended.empty():
                    done.append(ended.get_nowait())
                finished = [(running.pop(task), _result(task)) for task in done]
                await self._keep([(draw.key, group) for draw, group in finished if group and draw.key not in stored])
                for draw, group in finished:
                    if group is None and not round_.is_stopping:
                        news.num_dropped += 1
                    elif group is None:
                        left.append(draw)
                    elif enough is not None and num_useful == enough.num_groups:
                        self._spare[draw.key] = group
                        left.append(draw)
                    else:
                        made.append((draw, group))
                        num_useful += enough is not None and _is_useful(group, recipe, enough)
                news.num_groups = len(made)
                if enough is not None and num_useful == enough.num_groups and not round_.is_stopping:
                    round_.is_stopping = True
                    if self.maker.engine is not None and round_.in_flight:
                        await self.maker.engine.abort(tuple(round_.in_flight))
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        left = sorted([*left, *todo], key=lambda draw: draw.group_id)
        made.sort(key=lambda pair: pair[0].group_id)
        counts = round_.counts
        counts.dropped_groups = news.num_dropped
        groups = [group for _, group in made]
        batch = Batch.from_groups(groups, [draw.group_id for draw, _ in made])
        advantages = recipe_advantages(recipe.shaped_rewards(batch), batch.group_ids, batch.sources, recipe)
        return Collected(groups, [draw.key for draw, _ in made], replace(batch, advantages=advantages), left, counts)

    async def give_up(self, keys: Collection[GroupKey]) -> None:
        """These groups will not be asked for again, whatever there is of them."""
        for key in keys:
            self._begun.pop(key, None)
            self._spare.pop(key, None)
        if self.bank is not None:
            self.bank.mark_dropped(dict.fromkeys(keys, "its phase was over"))

    async def sample(
        self, prompts: Sequence[Prompt], num_samples: int, sampling: SamplingParams, *, name: str
    ) -> list[list[Sample]]:
        """Own samples only, scored: for evaluation. `name` keeps the requests of one evaluation apart from others."""
        round_ = Round()

        async def one(prompt: Prompt, number: int) -> Sample | None:
            try:
                sample = await self.maker.own(prompt, sampling, f"{name}/{prompt.row}/{number}", round_)
            except (RolloutError, RewardError) as error:
                self._warn_once(f"a sample is left out: {error}")
                return None
            assert isinstance(sample, Sample)
            return sample

        async def of(prompt: Prompt) -> list[Sample]:
            drawn = await asyncio.gather(*(one(prompt, number) for number in range(num_samples)))
            return [sample for sample in drawn if sample is not None]

        return list(await asyncio.gather(*map(of, prompts)))

    async def draw(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, names: Sequence[str]
    ) -> list[Completion | None]:
        """One completion of each prompt, unscored; None where none came. `names` tell the requests apart."""
        round_ = Round()

        async def of(prompt: Prompt, name: str) -> Completion | None:
            try:
                drawn = await self.maker.draw(prompt, sampling, name, round_)
            except RolloutError as error:
                self._warn_once(f"a response is left as it is: {error}")
                return None
            assert isinstance(drawn, Completion)
            return drawn

        return list(await asyncio.gather(*map(of, prompts, names)))

    async def _group(
        self,
        prompt: Prompt,
        key: GroupKey,
        recipe: GroupRecipe,
        round_: Round,
        stored: set[GroupKey],
        keep_partial: bool,
    ) -> Group | None:
        """None: one of its responses failed for good, or the round was stopped."""
        if key in self._spare:
            return self._spare.pop(key)
        if key in stored and self.bank is not None:
            if (taken := self.bank.take(key)) is not None:
                round_.counts.restored_groups += 1
                return Group(prompt, taken[1])
            stored.discard(key)  # it cannot be read any more
        name = f"{key.rollout_id}/{key.group_id}/{prompt.row}"  # a row may be drawn twice in a rollout
        choose = random.Random(f"{self.maker.seed}/{name}")
        recorded = [
            *_choose(prompt.responses, Source.EXPERT, recipe.n_expert, choose),
            *_choose(prompt.responses, Source.TEACHER, recipe.n_teacher, choose),
        ]
        missing = recipe.n_expert + recipe.n_teacher - len(recorded)
        # Without own samples there is no engine to refill from (SFT): the group is what the data holds.
        n_self = recipe.n_self + missing if recipe.n_self else 0
        begun = self._begun.pop(key, None)
        if begun is None:
            hints = [
                NO_HINT if recipe.hints is None else draw_hint(prompt, recipe.hints, choose) for _ in range(n_self)
            ]
            begun = _Begun([NOTHING_DRAWN] * n_self, hints)

        async def own(number: int) -> Sample | Partial:
            before = begun.samples[number]
            if isinstance(before, Sample):
                return before
            return await self.maker.own(
                prompt, recipe.sampling, f"{name}/{number}", round_, hint=begun.hints[number], begun=before
            )

        failed = False
        try:
            async with asyncio.TaskGroup() as tasks:
                theirs = [
                    tasks.create_task(self.maker.recorded(prompt, i, recipe.needs_rewards, round_.counts))
                    for i in recorded
                ]
                ours = [tasks.create_task(own(number)) for number in range(n_self)]
        except* (RolloutError, RewardError) as failures:
            self._warn_once(f"a group is left out: {failures.exceptions[0]}")
            failed = True
        if failed:
            return None
        samples = [task.result() for task in (*theirs, *ours)]
        whole = tuple(sample for sample in samples if isinstance(sample, Sample))
        if len(whole) < len(samples):
            if keep_partial:
                self._begun[key] = _Begun([task.result() for task in ours], begun.hints)
            return None
        round_.counts.refilled_samples += n_self - recipe.n_self
        return Group(prompt, whole) if whole else None  # a row without responses makes no group

    def _forget_older(self, version: int) -> None:
        for key, begun in list(self._begun.items()):
            if any(span.version < version for sample in begun.samples for span in sample.weight_spans):
                del self._begun[key]
        for key, group in list(self._spare.items()):
            if any(span.version < version for sample in group.samples for span in sample.weight_spans):
                del self._spare[key]

    def _stored(self, draws: Sequence[Draw]) -> set[GroupKey]:
        """The groups that a run before this one had finished."""
        if self.bank is None:
            return set()
        found = self.bank.restored
        keys = {draw.key for draw in draws if draw.key in found and found[draw.key].entry.row == draw.row}
        if self.maker.engine is not None and self.maker.engine.is_reproducible and len(keys) < len(draws):
            # It draws the same groups again only if it draws all of them together again.
            return set()
        return keys

    async def _keep(self, groups: Sequence[tuple[GroupKey, Group]]) -> None:
        if self.bank is not None and groups:
            await asyncio.to_thread(self.bank.append, groups)

    def _warn_once(self, text: str) -> None:
        """The counters tell how many; one reason is enough to look for the cause."""
        if not self._warned:
            self._warned = True
            _logger.warning("%s", text)


def _result(task: asyncio.Task[Group | None]) -> Group | None:
    try:
        return task.result()
    except ExceptionGroup as failures:  # of a TaskGroup: nothing that a group could be left out for
        raise failures.exceptions[0] from failures


def _is_useful(group: Group, recipe: GroupRecipe, enough: Enough) -> bool:
    if not enough.skip_zero_variance:
        return True
    batch = Batch.from_groups([group], [0])
    advantages = recipe_advantages(recipe.shaped_rewards(batch), batch.group_ids, batch.sources, recipe)
    return bool((advantages != 0).any())


def _choose(responses: tuple[RecordedResponse, ...], source: Source, wanted: int, choose: random.Random) -> list[int]:
    available = [i for i, response in enumerate(responses) if response.source == source]
    return available if len(available) <= wanted else sorted(choose.sample(available, wanted))
