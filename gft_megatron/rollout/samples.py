"""One response at a time: a recorded one with its reward, or one that the model draws.

Whatever fails raises; what is returned is whole. Groups are made of these in collect.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gft_megatron.groups import Prompt, Sample, Source, WeightSpan
from gft_megatron.rewards import Reward, RewardError
from gft_megatron.rollout.counts import CollectCounts
from gft_megatron.rollout.engine import (
    Completion,
    FinishReason,
    GenerateRequest,
    Partial,
    RequestAborted,
    RolloutEngine,
    RolloutError,
    SamplingParams,
)
from gft_megatron.rollout.hints import NO_HINT

NOTHING_DRAWN = Partial(np.zeros(0, np.int64), np.zeros(0, np.float32), ())


@dataclass
class Round:
    """Requests that may be stopped together."""

    counts: CollectCounts = field(default_factory=CollectCounts)
    is_stopping: bool = False
    in_flight: set[str] = field(default_factory=set)
    """Ids of the requests that the engine has."""


@dataclass
class SampleMaker:
    """Draws and scores. Not more than `max_concurrent_samples` requests are with the engine at a time."""

    engine: RolloutEngine | None
    """None where no sample will be drawn (SFT on recorded responses)."""
    reward: Reward
    decode: Callable[[Sequence[int]], str]
    """Token ids to text, special tokens kept: a drawn <pad> in the middle of an answer must not vanish from it."""
    seed: int
    max_concurrent_samples: int
    _recorded_rewards: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.max_concurrent_samples)

    async def recorded(self, prompt: Prompt, index: int, needs_reward: bool, counts: CollectCounts) -> Sample:
        """The recorded response of this index.

        Raises:
            RewardError: it could not be scored.
        """
        response = prompt.responses[index]
        reward = float("nan")
        if needs_reward:
            key = (prompt.row, index, hash(response.text))  # a rewriting gives the same place another text
            if key not in self._recorded_rewards:
                self._recorded_rewards[key] = await self._score(response.text, prompt, counts)
            reward = self._recorded_rewards[key]
        return Sample(
            response.source,
            response.token_ids,
            response.text,
            reward,
            response=index,
            token_groups=response.token_groups,
        )

    async def own(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        name: str,
        round_: Round,
        *,
        hint: np.ndarray = NO_HINT,  # [hint length] int64
        begun: Partial = NOTHING_DRAWN,
    ) -> Sample | Partial:
        """The hint and what the model makes of it, as one response: of its length, its reward and its tokens.

        Args:
            name: tells requests of one run apart; the engine may draw its random numbers from it.
            begun: what was drawn of it before, after the hint.

        Returns:
            what had been drawn, if the round was stopped in the meantime.

        Raises:
            RolloutError, RewardError: no whole response came of it, or none that could be scored.
        """
        started = time.perf_counter()
        try:
            drawn = await self.draw(prompt, sampling, name, round_, hint=hint, begun=begun)
        finally:
            round_.counts.generate_sec = max(round_.counts.generate_sec, time.perf_counter() - started)
        if isinstance(drawn, Partial):
            return drawn
        tokens = np.concatenate([hint, drawn.token_ids])
        stopped = drawn.finish_reason is FinishReason.STOP
        text = self.decode((tokens[:-1] if stopped else tokens).tolist())
        return Sample(
            source=Source.SELF,
            token_ids=tokens,
            text=text,
            reward=await self._score(text, prompt, round_.counts),
            truncated=not stopped,
            rollout_log_probs=np.concatenate([np.full(len(hint), np.nan, np.float32), drawn.log_probs]),
            weight_spans=_moved(drawn.weight_spans, len(hint)),
        )

    async def draw(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        name: str,
        round_: Round,
        *,
        hint: np.ndarray = NO_HINT,  # [hint length] int64
        begun: Partial = NOTHING_DRAWN,
    ) -> Completion | Partial:
        """As `own`, unscored and without the hint."""
        assert self.engine is not None
        async with self._slots:
            if round_.is_stopping:
                return begun
            request = GenerateRequest(
                _request_id(self.seed, name, len(begun.token_ids)),
                (*prompt.token_ids.tolist(), *hint.tolist(), *begun.token_ids.tolist()),
                replace(sampling, max_new_tokens=sampling.max_new_tokens - len(hint) - len(begun.token_ids)),
            )
            round_.in_flight.add(request.request_id)
            try:
                completion = await self.engine.generate(request)
            except RequestAborted as error:
                if not round_.is_stopping:
                    round_.counts.failed_samples += 1
                    raise
                return _joined(begun, error.partial or NOTHING_DRAWN)
            except RolloutError:
                round_.counts.failed_samples += 1
                raise
            finally:
                round_.in_flight.discard(request.request_id)
        if not len(begun.token_ids):
            return completion
        round_.counts.resumed_samples += 1
        whole = _joined(begun, Partial(completion.token_ids, completion.log_probs, completion.weight_spans))
        return replace(
            completion, token_ids=whole.token_ids, log_probs=whole.log_probs, weight_spans=whole.weight_spans
        )

    async def _score(self, text: str, prompt: Prompt, counts: CollectCounts) -> float:
        started = time.perf_counter()
        try:
            return await self.reward.score(text, prompt.label, prompt.metadata)
        except RewardError:
            counts.reward_errors += 1
            raise
        finally:
            counts.reward_sec = max(counts.reward_sec, time.perf_counter() - started)


def _joined(first: Partial, second: Partial) -> Partial:
    return Partial(
        np.concatenate([first.token_ids, second.token_ids]),
        np.concatenate([first.log_probs, second.log_probs]),
        (*first.weight_spans, *_moved(second.weight_spans, len(first.token_ids))),
    )


def _moved(spans: Sequence[WeightSpan], by: int) -> tuple[WeightSpan, ...]:
    return tuple(WeightSpan(span.version, span.start + by, span.end + by) for span in spans)


def _request_id(seed: int, name: str, num_drawn: int) -> str:
    """32 hex digits, the same again in a resumed run: an engine may seed its random numbers with it."""
    return hashlib.sha256(f"{seed}/{name}/{num_drawn + 1}".encode()).hexdigest()[:32]
