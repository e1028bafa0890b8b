"""New weights reach real servers whole, by every way, and whatever fails leaves no server paused or half new.

What a server computes after an update is compared with transformers in float32 with the same weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gft_megatron.rollout.sglang.http import Http, Keys
from gft_megatron.rollout.sglang.weight_sync import WeightSync, build_weight_sync
from gft_megatron.rollout.sglang.weight_sync.versions import checksum

TOKENS = [7, 31, 100, 5, 250, 77, 12, 9, 300, 41, 8, 8]
BUCKET_BYTES = 100_000  # several to a model of half a megabyte


class Model:
    """The servers' model with other weights, and what transformers makes of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters():
            yield name, parameter.detach()

    @torch.no_grad()
    def log_probs(self) -> Tensor:  # [tokens - 1]
        logits = self._model(torch.tensor([TOKENS])).logits[0, :-1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(TOKENS)[1:, None])[:, 0]


async def log_probs_of(http: Http, url: str) -> Tensor:  # [tokens - 1]
    body = {
        "input_ids": TOKENS,
        "sampling_params": {"max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answer = await http.call(url, "/generate", body, timeout_sec=60)
    return torch.tensor([entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]])


async def version_of(http: Http, url: str) -> str:
    return (await http.call(url, "/model_info", timeout_sec=60))["weight_version"]


async def check_serves(http: Http, url: str, model: Model, version: int) -> None:
    assert await version_of(http, url) == str(version)
    torch.testing.assert_close(await log_probs_of(http, url), model.log_probs(), atol=1e-4, rtol=0)


@pytest.fixture
def make_sync(tmp_path: Path, sglang_model: Path) -> Callable[[str, Http], WeightSync]:
    def make(name: str, http: Http) -> WeightSync:
        return build_weight_sync(
            name,
            http,
            folder=tmp_path / "weights",
            source_folder=sglang_model,
            dtype=torch.float32,
            device=torch.device("cpu"),
            bucket_bytes=BUCKET_BYTES,
            compare_checksums=True,
        )

    return make


@pytest.fixture
def with_http(sglang_keys: Keys) -> Callable[[Callable[[Http], Awaitable[None]]], None]:
    def run(body: Callable[[Http], Awaitable[None]]) -> None:
        async def main() -> None:
            async with Http(sglang_keys) as http:
                await body(http)

        asyncio.run(asyncio.wait_for(main(), 120))

    return run


WAYS = ["disk", "distributed", "tensor"]


@pytest.mark.parametrize("way", WAYS)
def test_every_server_computes_with_the_new_weights(way, with_http, make_sync, sglang_workers, sglang_model) -> None:
    async def body(http: Http) -> None:
        sync = make_sync(way, http)
        for version, seed in ((3, 1), (4, 2)):
            model = Model(sglang_model, seed)
            for url in sglang_workers:
                await log_probs_of(http, url)  # fills the prefix cache, which the old weights computed
            result = await sync.push(sglang_workers, model.tensors(), version, allow_running=False)
            assert (result.acknowledged, result.failed) == (tuple(sglang_workers), {})
            for url in sglang_workers:
                await check_serves(http, url, model, version)
            assert len({await checksum(http, url) for url in sglang_workers}) == 1
        await sync.close()

    with_http(body)
