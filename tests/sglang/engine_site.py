"""An engine on real servers whose weights stay as they are, and requests to it."""

import asyncio
import uuid
from types import SimpleNamespace

from transformers import AutoConfig

from gft_megatron.groups import WeightSpan
from gft_megatron.rollout.engine import FinishReason, GenerateRequest, SamplingParams
from gft_megatron.rollout.sglang.client import ModelFacts
from gft_megatron.rollout.sglang.engine import SGLangEngine
from gft_megatron.rollout.sglang.fleet import State
from gft_megatron.rollout.sglang.http import Http
from gft_megatron.rollout.sglang.loads import read_load

VERSION = 41  # no other test's: what a server had before is not mistaken for it


class VersionOnly:
    """Leaves the weights alone and gives servers the version."""

    def __init__(self, keys):
        self.keys = keys
        self.refuse = set()
        self.asked = []

    async def push(self, urls, named_tensors, version, *, allow_running):
        for _ in named_tensors:
            pass
        self.version = str(version)
        for url in urls:
            await self._set(url)
        return SimpleNamespace(acknowledged=tuple(urls), failed={}, seconds=0.0)

    async def catch_up(self, url):
        self.asked.append(url)
        if url in self.refuse:
            return False
        await self._set(url)
        return True

    async def _set(self, url):
        async with Http(self.keys) as http:
            body = {"new_version": self.version, "abort_all_requests": False}
            await http.call(url, "/update_weight_version", body, timeout_sec=30, admin=True)

    async def close(self):
        pass


def model_facts(folder):
    config = AutoConfig.from_pretrained(folder)
    return ModelFacts(
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        eos_token_ids={config.eos_token_id},
    )


class Site:
    def __init__(self, workers, keys, facts, **options):
        self.sync = VersionOnly(keys)
        self.workers = workers
        self.keys = keys
        self.facts = facts
        self.options = options

    async def __aenter__(self):
        self.http = Http(self.keys)
        self.engine = SGLangEngine(
            lambda: self.workers, keys=self.keys, model=self.facts, weight_sync=lambda http: self.sync, **self.options
        )
        await self.engine.update_weights([], VERSION)
        return self

    async def __aexit__(self, *_):
        await self.engine.close()
        await self.http.close()
        assert self.engine.figures()["in_flight"] == 0

    async def on_servers(self):
        loads = [await read_load(self.http, url, timeout_sec=30) for url in self.workers]
        return sum(load.running + load.queued for load in loads)

    async def until_idle(self):
        async with asyncio.timeout(60):
            while await self.on_servers():
                await asyncio.sleep(0.05)

    async def served_again(self, url):
        async with asyncio.timeout(240):
            while self.engine._fleet.state(url) is not State.HEALTHY:
                await asyncio.sleep(0.1)


def request(prompt=(5, 6, 7), new=16, **sampling):
    return GenerateRequest(uuid.uuid4().hex, tuple(prompt), SamplingParams(new, **sampling))


def check_whole(completion, asked, facts):
    """Everything that a sample is used for."""
    length = len(completion.token_ids)
    assert completion.request_id == asked.request_id and len(completion.log_probs) == length
    assert completion.weight_spans == (WeightSpan(VERSION, 0, length),)
    ends = [token in facts.eos_token_ids for token in completion.token_ids.tolist()]
    if completion.finish_reason is FinishReason.STOP:
        assert ends == [False] * (length - 1) + [True] and length <= asked.sampling.max_new_tokens
    else:
        assert not any(ends) and length == asked.sampling.max_new_tokens
