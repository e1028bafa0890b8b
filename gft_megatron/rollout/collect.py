"""From prompts to scored groups: recorded responses, own samples, rewards, advantages.

Nothing false becomes a sample: a response that failed to generate or to score is left out and counted, and a group that
lost all but one of its responses is dropped.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count

import numpy as np
import torch
from torch import Tensor

from gft_megatron.advantages import AdvantageNormalization, group_advantages
from gft_megatron.groups import Batch, Group, Prompt, RecordedResponse, Sample, Source
from gft_megatron.rewards import Reward, RewardError
from gft_megatron.rollout.engine import (
    Completion,
    FinishReason,
    GenerateRequest,
    RequestRefused,
    RolloutEngine,
    RolloutError,
    SamplingParams,
)
from gft_megatron.rollout.hints import NO_HINT, Hints, draw_hint

_ATTEMPTS = 3
_logger = logging.getLogger(__name__)


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


@dataclass
class CollectCounts:
    """What happened while groups were collected; added up over collectors."""

    dropped_groups: int = 0
    """Groups that lost too many responses to failures."""
    refilled_samples: int = 0
    """Own samples drawn because a recorded response was missing."""
    failed_samples: int = 0
    reward_errors: int = 0
    generate_sec: float = 0.0
    reward_sec: float = 0.0

    def add(self, other: CollectCounts) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass
class Collector:
    """Makes groups of prompts. One lives on every rank that has an engine."""

    engine: RolloutEngine | None
    """None where no sample will be drawn (SFT on recorded responses)."""
    reward: Reward
    decode: Callable[[Sequence[int]], str]
    """Token ids to text, special tokens kept: a drawn <pad> in the middle of an answer must not vanish from it."""
    seed: int
    max_concurrent_samples: int
    _recorded_rewards: dict[tuple[int, int, int], float] = field(default_factory=dict)
    _warned: bool = False

    async def collect(
        self, prompts: Sequence[Prompt], group_ids: Sequence[int], recipe: GroupRecipe, *, rollout_id: int
    ) -> tuple[list[Group], Batch, CollectCounts]:
        """The groups of these prompts, and the same flat, with advantages.

        Args:
            group_ids: one for each prompt, distinct over all collectors of this rollout.
            rollout_id: decides, with the seed, which recorded responses are taken and the names of the requests.
        """
        counts = CollectCounts()
        limit = asyncio.Semaphore(self.max_concurrent_samples)
        made = await asyncio.gather(
            *(
                # A row may be drawn twice in a rollout; its group id keeps the requests apart.
                self._group(prompt, recipe, f"{rollout_id}/{group_id}", limit, counts)
                for prompt, group_id in zip(prompts, group_ids, strict=True)
            )
        )
        groups = [group for group in made if group is not None]
        ids = [group_id for group, group_id in zip(made, group_ids, strict=True) if group is not None]
        counts.dropped_groups = len(made) - len(groups)
        batch = Batch.from_groups(groups, ids)
        advantages = recipe_advantages(recipe.shaped_rewards(batch), batch.group_ids, batch.sources, recipe)
        return groups, replace(batch, advantages=advantages), counts

    async def sample(
        self, prompts: Sequence[Prompt], num_samples: int, sampling: SamplingParams, *, name: str
    ) -> list[list[Sample]]:
        """Own samples only, scored: for evaluation. `name` keeps the requests of one evaluation apart from others."""
        counts = CollectCounts()
        limit = asyncio.Semaphore(self.max_concurrent_samples)

        async def of(prompt: Prompt) -> list[Sample]:
            drawn = await asyncio.gather(
                *(
                    self._own(prompt, NO_HINT, sampling, f"{name}/{prompt.row}/{k}", limit, counts)
                    for k in range(num_samples)
                )
            )
            return [sample for sample in drawn if sample is not None]

        return list(await asyncio.gather(*map(of, prompts)))

    async def draw(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, names: Sequence[str]
    ) -> list[Completion | None]:
        """One completion of each prompt, unscored; None where none came. `names` tell the requests apart."""
        limit = asyncio.Semaphore(self.max_concurrent_samples)

        async def of(prompt: Prompt, name: str) -> Completion | None:
            async with limit:
                return await self._generate(prompt, NO_HINT, sampling, name)

        return list(await asyncio.gather(*map(of, prompts, names)))

    async def _group(
        self, prompt: Prompt, recipe: GroupRecipe, name: str, limit: asyncio.Semaphore, counts: CollectCounts
    ) -> Group | None:
        choose = random.Random(f"{self.seed}/{name}/{prompt.row}")
        recorded = [
            *_choose(prompt.responses, Source.EXPERT, recipe.n_expert, choose),
            *_choose(prompt.responses, Source.TEACHER, recipe.n_teacher, choose),
        ]
        missing = recipe.n_expert + recipe.n_teacher - len(recorded)
        # Without own samples there is no engine to refill from (SFT): the group is what the data holds.
        n_self = recipe.n_self + missing if recipe.n_self else 0
        counts.refilled_samples += n_self - recipe.n_self
        hints = [NO_HINT if recipe.hints is None else draw_hint(prompt, recipe.hints, choose) for _ in range(n_self)]
        samples = await asyncio.gather(
            *(self._recorded(prompt, i, recipe.needs_rewards, counts) for i in recorded),
            *(
                self._own(prompt, hint, recipe.sampling, f"{name}/{prompt.row}/{k}", limit, counts)
                for k, hint in enumerate(hints)
            ),
        )
        kept = tuple(sample for sample in samples if sample is not None)
        # One response left of several says nothing about the others; one of one is what the data holds.
        return Group(prompt, kept) if len(kept) >= min(2, len(samples)) > 0 else None

    async def _recorded(self, prompt: Prompt, index: int, needs_reward: bool, counts: CollectCounts) -> Sample | None:
        response = prompt.responses[index]
        reward = float("nan")
        if needs_reward:
            key = (prompt.row, index, hash(response.text))  # a rewriting gives the same place another text
            if key not in self._recorded_rewards:
                scored = await self._score(response.text, prompt, counts)
                if scored is None:
                    return None
                self._recorded_rewards[key] = scored
            reward = self._recorded_rewards[key]
        return Sample(
            response.source,
            response.token_ids,
            response.text,
            reward,
            response=index,
            token_groups=response.token_groups,
        )

    async def _own(
        self,
        prompt: Prompt,
        hint: np.ndarray,  # [hint length] int64
        sampling: SamplingParams,
        name: str,
        limit: asyncio.Semaphore,
        counts: CollectCounts,
    ) -> Sample | None:
        """The hint and what the model makes of it, as one response: of its length, its reward and its tokens."""
        started = time.perf_counter()
        async with limit:
            completion = await self._generate(prompt, hint, sampling, name)
        counts.generate_sec = max(counts.generate_sec, time.perf_counter() - started)
        if completion is None:
            counts.failed_samples += 1
            return None
        tokens = np.concatenate([hint, completion.token_ids])
        stopped = completion.finish_reason is FinishReason.STOP
        text = self.decode((tokens[:-1] if stopped else tokens).tolist())
        reward = await self._score(text, prompt, counts)
        if reward is None:
            return None
        return Sample(
            source=Source.SELF,
            token_ids=tokens,
            text=text,
            reward=reward,
            truncated=not stopped,
            rollout_log_probs=np.concatenate([np.full(len(hint), np.nan, np.float32), completion.log_probs]),
            weight_spans=tuple(
                replace(span, start=span.start + len(hint), end=span.end + len(hint))
                for span in completion.weight_spans
            ),
        )

    async def _generate(
        self, prompt: Prompt, hint: np.ndarray, sampling: SamplingParams, name: str
    ) -> Completion | None:
        assert self.engine is not None
        prompt_ids = (*prompt.token_ids.tolist(), *hint.tolist())
        sampling = replace(sampling, max_new_tokens=sampling.max_new_tokens - len(hint))
        for attempt in count(1):
            request = GenerateRequest(_request_id(self.seed, name, attempt), prompt_ids, sampling)
            try:
                return await self.engine.generate(request)
            except RolloutError as error:
                if isinstance(error, RequestRefused) or attempt == _ATTEMPTS:
                    self._warn_once(f"a sample is left out: {error}")
                    return None
        raise AssertionError

    async def _score(self, text: str, prompt: Prompt, counts: CollectCounts) -> float | None:
        started = time.perf_counter()
        try:
            return await self.reward.score(text, prompt.label, prompt.metadata)
        except RewardError as error:
            counts.reward_errors += 1
            self._warn_once(f"a response is left out: its reward failed: {error}")
            return None
        finally:
            counts.reward_sec = max(counts.reward_sec, time.perf_counter() - started)

    def _warn_once(self, text: str) -> None:
        """The counters tell how many; one reason is enough to look for the cause."""
        if not self._warned:
            self._warned = True
            _logger.warning("%s", text)


def _choose(responses: tuple[RecordedResponse, ...], source: Source, wanted: int, choose: random.Random) -> list[int]:
    available = [i for i, response in enumerate(responses) if response.source == source]
    return available if len(available) <= wanted else sorted(choose.sample(available, wanted))


def _request_id(seed: int, name: str, attempt: int) -> str:
    """32 hex digits, the same again in a resumed run: an engine may seed its random numbers with it."""
    return hashlib.sha256(f"{seed}/{name}/{attempt}".encode()).hexdigest()[:32]
