"""Measure what sampling through this project costs: tokens a second of one SGLang server, asked in three ways.

GFT_SGLANG_API_KEY=... GFT_SGLANG_ADMIN_KEY=... python tools/bench_rollout.py --url http://127.0.0.1:30000 \\
    --hf-checkpoint tiny --concurrency 64 256 --json out.json

bare: an asyncio loop with aiohttp that sends the same requests and reads the JSON of the answers, no more.
client: `SGLangEngine`: every answer checked, the server's progress watched.
collect: `Collector` on top: groups of 8, rewards, advantages.

The three take turns, in another order each round. The table has the medians of the rounds; `ratio` is that of the
ratios to bare in the same round. A server's speed wavers more than what lies between the three: `client_ms` is this
process's own CPU time for 1000 tokens, which does not. The server's weights are called version 0 by this.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
from torch import Tensor
from transformers import AutoConfig

from gft_megatron.command_line import parse_flags
from gft_megatron.groups import GroupKey, Prompt
from gft_megatron.rewards import Reward
from gft_megatron.rollout.collect import Collector
from gft_megatron.rollout.draws import Draw
from gft_megatron.rollout.engine import GenerateRequest, SamplingParams
from gft_megatron.rollout.recipe import GroupRecipe
from gft_megatron.rollout.samples import SampleMaker
from gft_megatron.rollout.sglang.client import ModelFacts, request_body
from gft_megatron.rollout.sglang.engine import SGLangEngine
from gft_megatron.rollout.sglang.http import Http, Keys

_GROUP = 8


@dataclass(frozen=True, kw_only=True)
class BenchRollout:
    """What to measure."""

    url: str
    """A running server."""
    hf_checkpoint: Path
    """The Hugging Face folder that it serves."""
    concurrency: tuple[int, ...] = (64, 256)
    """Requests in flight; several make several sections of the table."""
    requests: int = 4
    """Requests of a round, times the concurrency."""
    prompt_length: int = 64
    """Tokens of a prompt; 8 requests in a row share one."""
    max_new_tokens: int = 128
    """Longest response."""
    rounds: int = 5
    """How often each way is measured."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if any(concurrency % _GROUP for concurrency in self.concurrency):
            raise ValueError(f"--concurrency {self.concurrency}: groups have {_GROUP} samples, give multiples of it")


@dataclass(frozen=True)
class Row:
    """One way at one concurrency."""

    concurrency: int
    way: str
    tokens_per_sec: float
    ratio: float
    client_ms: float


class _Version:
    """Changes no weights."""

    def __init__(self, http: Http) -> None:
        self._http = http

    async def push(
        self, urls: Sequence[str], named_tensors: Iterable[tuple[str, Tensor]], version: int, *, allow_running: bool
    ) -> Any:
        for url in urls:
            body = {"new_version": str(version), "abort_all_requests": False}
            await self._http.call(url, "/update_weight_version", body, timeout_sec=30, admin=True)
        return SimpleNamespace(acknowledged=urls, failed={}, seconds=0.0)

    async def catch_up(self, url: str) -> bool:
        raise AssertionError

    async def close(self) -> None:
        pass


class _Length(Reward):
    """Costs nothing."""

    async def score(self, response: str, label: str, metadata: Mapping[str, Any]) -> float:
        return float(len(response) % 2)


async def measure(settings: BenchRollout, keys: Keys) -> AsyncIterator[Row]:
    """The rows, as they are measured."""
    config = AutoConfig.from_pretrained(settings.hf_checkpoint)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    model = ModelFacts(
        vocab_size=config.vocab_size, max_positions=config.max_position_embeddings, eos_token_ids=set(ends)
    )
    engine = SGLangEngine(lambda: [settings.url], keys=keys, model=model, weight_sync=_Version)
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),  # as ours: a server drops idle ones after 5 s
        headers=keys.headers(admin=False),
        timeout=aiohttp.ClientTimeout(None),
    )
    await engine.update_weights([], 0)
    ways = [_Bare(session, settings, model), _Client(engine, settings), _Collect(engine, settings)]
    try:
        for concurrency in settings.concurrency:
            speeds: dict[str, list[float]] = {way.name: [] for way in ways}
            costs: dict[str, list[float]] = {way.name: [] for way in ways}
            draw = random.Random(0)
            for round_ in range(-1, settings.rounds):  # the first one warms up
                for way in draw.sample(ways, len(ways)):
                    prompts = _prompts(settings, concurrency, model.vocab_size, draw)
                    began, cpu_began = time.perf_counter(), time.process_time()
                    tokens = await way.run(prompts, concurrency)
                    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
                    if round_ >= 0:
                        speeds[way.name].append(tokens / seconds)
                        costs[way.name].append(cpu / tokens * 1e6)
            for name, measured in speeds.items():
                ratios = [speed / bare for speed, bare in zip(measured, speeds["bare"], strict=True)]
                yield Row(concurrency, name, *map(statistics.median, (measured, ratios, costs[name])))
    finally:
        await session.close()
        await engine.close()


def _prompts(settings: BenchRollout, concurrency: int, vocab_size: int, draw: random.Random) -> list[tuple[int, ...]]:
    """One for each group, never the same again: a server remembers prompts."""
    count = settings.requests * concurrency // _GROUP
    return [tuple(draw.randrange(vocab_size) for _ in range(settings.prompt_length)) for _ in range(count)]


def _requests(prompts: Sequence[tuple[int, ...]], settings: BenchRollout) -> list[GenerateRequest]:
    sampling = SamplingParams(settings.max_new_tokens)
    return [GenerateRequest(uuid.uuid4().hex, prompt, sampling) for prompt in prompts for _ in range(_GROUP)]


async def _at_most(
    concurrency: int, one: Callable[[GenerateRequest], Awaitable[int]], requests: Sequence[GenerateRequest]
) -> int:
    limit = asyncio.Semaphore(concurrency)

    async def limited(request: GenerateRequest) -> int:
        async with limit:
            return await one(request)

    return sum(await asyncio.gather(*map(limited, requests)))


class _Bare:
    name = "bare"

    def __init__(self, session: aiohttp.ClientSession, settings: BenchRollout, model: ModelFacts) -> None:
        self._session = session
        self._settings = settings
        self._model = model

    async def run(self, prompts: Sequence[tuple[int, ...]], concurrency: int) -> int:
        return await _at_most(concurrency, self._one, _requests(prompts, self._settings))

    async def _one(self, request: GenerateRequest) -> int:
        body = request_body(request, self._model, request.request_id)
        async with self._session.post(f"{self._settings.url}/generate", json=body) as answer:
            return len((await answer.json())["output_ids"])


class _Client:
    name = "client"

    def __init__(self, engine: SGLangEngine, settings: BenchRollout) -> None:
        self._engine = engine
        self._settings = settings

    async def run(self, prompts: Sequence[tuple[int, ...]], concurrency: int) -> int:
        return await _at_most(concurrency, self._one, _requests(prompts, self._settings))

    async def _one(self, request: GenerateRequest) -> int:
        return len((await self._engine.generate(request)).token_ids)


class _Collect:
    name = "collect"

    def __init__(self, engine: SGLangEngine, settings: BenchRollout) -> None:
        self._engine = engine
        sampling = SamplingParams(settings.max_new_tokens)
        self._recipe = GroupRecipe(n_expert=0, n_teacher=0, n_self=_GROUP, sampling=sampling, needs_advantages=True)
        self._rollout = 0

    async def run(self, prompts: Sequence[tuple[int, ...]], concurrency: int) -> int:
        maker = SampleMaker(self._engine, _Length(), lambda ids: "", 0, concurrency)
        self._rollout += 1
        of_rows = [Prompt(row=i, token_ids=np.array(prompt), label="") for i, prompt in enumerate(prompts)]
        draws = [Draw(GroupKey(self._rollout, i), i, i) for i in range(len(of_rows))]
        batch = (await Collector(maker).collect(of_rows, draws, self._recipe)).batch
        return int((batch.lengths - batch.prompt_lengths).sum())


async def show(settings: BenchRollout, keys: Keys) -> list[Row]:
    print(f"{'in flight':>9}  {'way':8}{'tokens/s':>10}{'ratio':>8}{'client_ms':>11}")
    rows = []
    async for row in measure(settings, keys):
        speeds = f"{row.tokens_per_sec:>10,.0f}{row.ratio:>8.3f}{row.client_ms:>11.2f}"
        print(f"{row.concurrency:>9}  {row.way:8}{speeds}", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    try:
        settings = parse_flags(BenchRollout, description=__doc__)
        keys = Keys(os.environ.get("GFT_SGLANG_API_KEY"), os.environ.get("GFT_SGLANG_ADMIN_KEY"))
        gc.freeze()  # as training/loop.py does
        rows = asyncio.run(show(settings, keys))
        if settings.json is not None:
            settings.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
