"""New weights reach real servers whole, by every way, and whatever fails leaves no server paused or half new.

What a server computes after an update is compared with transformers in float32 with the same weights.
"""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import torch
from push_from_ranks import Push, log_probs_at, push_from_ranks, server_log_probs
from ranks import run_on_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM

from gft_megatron.rollout.engine import GenerateRequest, SamplingParams
from gft_megatron.rollout.local import LocalEngine
from gft_megatron.rollout.sglang.dialect import weight_version
from gft_megatron.rollout.sglang.http import Http, Keys
from gft_megatron.rollout.sglang.weight_sync import SyncResult, WeightSync, build_weight_sync
from gft_megatron.rollout.sglang.weight_sync.versions import checksum, rename

TOKENS = [7, 31, 97, 5, 50, 77, 12, 9, 90, 41, 8, 8]  # of the 99 that the model has; another would kill a server
BUCKET_BYTES = 100_000  # several to a model of half a megabyte
WAYS = ["disk", "distributed", "tensor"]


class Model:
    """The servers' model with other weights, and what transformers makes of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.hf.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.hf.named_parameters():
            yield name, parameter.detach()

    def tensors_until(self, index: int, act: Callable[[], object]) -> Iterator[tuple[str, Tensor]]:
        """Before the tensor of this index, `act()`."""
        for i, item in enumerate(self.tensors()):
            if i == index:
                act()
            yield item

    @torch.no_grad()
    def log_probs(self, tokens: Sequence[int]) -> Tensor:  # [tokens - 1]
        return log_probs_at(self.hf(torch.tensor([tokens])).logits[0, :-1], tokens)


class Bench:
    """What a test needs, inside an event loop."""

    def __init__(self, http: Http, urls: tuple[str, str], folder: Path, source_folder: Path) -> None:
        self.http = http
        self.urls = urls
        self.folder = folder
        self._source_folder = source_folder

    def sync(self, way: str, http: Http | None = None) -> WeightSync:
        return build_weight_sync(
            way,
            http or self.http,
            folder=self.folder,
            source_folder=self._source_folder,
            dtype=torch.float32,
            device=torch.device("cpu"),
            bucket_bytes=BUCKET_BYTES,
            compare_checksums=True,
        )

    async def check_serves(self, url: str, model: Model, version: int) -> None:
        assert await weight_version(self.http, url) == str(version)
        found = await server_log_probs(self.http, url, TOKENS)  # no answer while a server is paused
        torch.testing.assert_close(found, model.log_probs(TOKENS), atol=1e-4, rtol=0)

    async def push(self, way: str, model: Model, version: int) -> SyncResult:
        """To both, with success."""
        result = await self.sync(way).push(self.urls, model.tensors(), version, allow_running=False)
        assert (result.acknowledged, result.failed) == (self.urls, {})
        return result

    async def generate(self, url: str, num_tokens: int) -> dict[str, Any]:
        body = {
            "input_ids": TOKENS,
            "sampling_params": {"max_new_tokens": num_tokens, "ignore_eos": True, "temperature": 1.0},
            "return_logprob": True,
        }
        return await self.http.call(url, "/generate", body, timeout_sec=90)

    async def until_generating(self, url: str) -> None:
        """Until the server holds more tokens than the prompt."""
        while True:
            loads = await self.http.call(url, "/v1/loads", timeout_sec=10)
            if loads["loads"][0]["num_used_tokens"] > 2 * len(TOKENS):
                return


@pytest.fixture
def run(
    sglang_workers: Sequence[str], sglang_keys: Keys, sglang_model: Path, tmp_path: Path
) -> Callable[[Callable[[Bench], Awaitable[None]]], None]:
    """Run a coroutine function on a bench, for five minutes at most."""

    def run_body(body: Callable[[Bench], Awaitable[None]]) -> None:
        async def main() -> None:
            async with Http(sglang_keys) as http:
                await body(Bench(http, tuple(sglang_workers), tmp_path / "weights", sglang_model))

        asyncio.run(asyncio.wait_for(main(), 300))

    return run_body


@pytest.fixture(scope="module")
def models(sglang_model: Path) -> tuple[Model, Model]:
    return Model(sglang_model, 1), Model(sglang_model, 2)


@pytest.mark.parametrize("way", WAYS)
def test_every_server_computes_with_the_new_weights(way, run, models) -> None:
    async def body(bench: Bench) -> None:
        for version, model in ((3, models[0]), (4, models[1])):
            for url in bench.urls:
                await bench.generate(url, 1)  # now the old weights' cache of this very prompt is there
            result = await bench.push(way, model, version)
            assert result.bytes == sum(tensor.nbytes for _, tensor in model.tensors())
            for url in bench.urls:
                answer = await bench.generate(url, 4)
                log_probs = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
                expected = model.log_probs(TOKENS + answer["output_ids"])[-4:]
                torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)
                await bench.check_serves(url, model, version)
            assert len({await checksum(bench.http, url) for url in bench.urls}) == 1

    run(body)


@pytest.mark.slow
def test_ranks_servers_and_local_engine_agree(run, models, tmp_path, sglang_workers, sglang_keys) -> None:
    pushes = []
    for index, (tp_size, pp_size, way) in enumerate(
        [(2, 1, "disk"), (1, 2, "disk"), (2, 1, "distributed"), (1, 2, "distributed")]
    ):
        weights = tmp_path / f"model-{index % 2}"  # no two pushes in a row of the same
        if not weights.exists():
            models[index % 2].hf.save_pretrained(weights)
        pushes.append(Push(tp_size, pp_size, way, weights, version=10 + index))
    run_on_ranks(push_from_ranks, 2, pushes, sglang_workers, sglang_keys, TOKENS, tmp_path)
    for index, push in enumerate(pushes):
        expected = models[index % 2].log_probs(TOKENS)
        for found in torch.load(tmp_path / f"{push.version}.pt", weights_only=True):  # Megatron, the servers
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    async def greedily(bench: Bench) -> None:
        engine = LocalEngine(pushes[-1].weights, eos_token_ids=[2], pad_token_id=0)
        await engine.update_weights(models[1].tensors(), pushes[-1].version)
        own = await engine.generate(GenerateRequest("x", tuple(TOKENS), SamplingParams(8, temperature=0.0)))
        sampling = {"max_new_tokens": 8, "temperature": 0.0, "stop_token_ids": [2]}
        body = {"input_ids": TOKENS, "sampling_params": sampling, "return_logprob": True}
        answer = await bench.http.call(bench.urls[0], "/generate", body, timeout_sec=60)
        log_probs, ids, _ = zip(*answer["meta_info"]["output_token_logprobs"], strict=True)
        # The model's own end token, which it draws here, ends a response of the server's too.
        length = len(ids)
        assert length >= 4 and list(ids) == own.token_ids.tolist()[:length]
        torch.testing.assert_close(torch.tensor(log_probs), torch.tensor(own.log_probs[:length]), atol=1e-4, rtol=0)

    run(greedily)


def test_requests_in_flight_go_on_with_the_new_weights(run, models) -> None:
    old, new = models

    async def body(bench: Bench) -> None:
        await bench.push("tensor", old, 20)
        (url, _) = bench.urls
        request = asyncio.create_task(bench.generate(url, 600))
        await bench.until_generating(url)
        result = await bench.sync("distributed").push(bench.urls, new.tensors(), 21, allow_running=True)
        assert result.acknowledged == bench.urls
        answer = await request
        assert answer["meta_info"]["finish_reason"]["type"] == "length"
        first, second = answer["meta_info"]["weight_versions"]
        change = first["end"]
        assert first == {"version": "20", "start": 0, "end": change}
        assert second == {"version": "21", "start": change, "end": 600}
        # Each token's log-prob is that of the weights it is said to come from, and of no cache that others computed.
        tokens = TOKENS + answer["output_ids"]
        expected = torch.cat(
            [
                old.log_probs(tokens)[len(TOKENS) - 1 : len(TOKENS) - 1 + change],
                new.log_probs(tokens)[len(TOKENS) - 1 + change :],
            ]
        )
        found = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    run(body)


def test_requests_in_flight_are_aborted_where_versions_may_not_mix(run, models) -> None:
    async def body(bench: Bench) -> None:
        await bench.push("tensor", models[0], 25)
        (url, _) = bench.urls
        request = asyncio.create_task(bench.generate(url, 1500))
        await bench.until_generating(url)
        await bench.push("tensor", models[1], 26)
        meta = (await request)["meta_info"]
        assert meta["finish_reason"]["type"] == "abort"
        assert [span["version"] for span in meta["weight_versions"]] == ["25"]

    run(body)


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_that_fails_halfway_leaves_servers_running(way, run, models) -> None:
    async def body(bench: Bench) -> None:
        def fail() -> None:
            assert sorted(bench.folder.glob("version_*")) == folders  # SGLang would read half a model without a word
            raise ArithmeticError("a rank is lost")

        await bench.push("disk", models[0], 30)
        folders = sorted(bench.folder.iterdir())
        with pytest.raises(ArithmeticError, match="a rank is lost"):
            await bench.sync(way).push(bench.urls, models[1].tensors_until(15, fail), 31, allow_running=True)
        assert sorted(bench.folder.iterdir()) == folders  # nothing of version 31 is to be seen
        for url in bench.urls:
            if way == "disk":  # the servers have not heard of it
                await bench.check_serves(url, models[0], 30)
            else:
                assert await weight_version(bench.http, url) == "incomplete-31"
                await bench.generate(url, 1)  # not paused
        await bench.push(way, models[1], 32)
        for url in bench.urls:
            await bench.check_serves(url, models[1], 32)

    run(body)


@pytest.mark.parametrize("way", WAYS)
def test_cancellation_takes_all_tensors_and_leaves_servers_running(way, run, models) -> None:
    async def body(bench: Bench) -> None:
        taken = 0

        def tensors() -> Iterator[tuple[str, Tensor]]:
            nonlocal taken
            for item in models[0].tensors_until(12, lambda: pushing.cancel()):
                taken += 1
                yield item

        pushing = asyncio.create_task(bench.sync(way).push(bench.urls, tensors(), 40, allow_running=True))
        with pytest.raises(asyncio.CancelledError):
            await pushing
        assert taken == sum(1 for _ in models[0].tensors())  # other ranks wait in the collectives of the rest
        for url in bench.urls:
            assert await weight_version(bench.http, url) != "40"
            await bench.generate(url, 1)

    run(body)


def test_weights_that_servers_refuse_are_nobodys_version(run, models) -> None:
    """By broadcast: SGLang 0.5.23 ends itself when a tensor in a request does not fit, instead of refusing it."""

    async def body(bench: Bench) -> None:
        await bench.push("tensor", models[0], 50)
        misshapen = [
            (name, tensor[:-1] if name == "model.layers.1.mlp.down_proj.weight" else tensor)
            for name, tensor in models[1].tensors()
        ]
        result = await bench.sync("distributed").push(bench.urls, misshapen, 51, allow_running=True)
        assert result.acknowledged == ()
        assert result.failed.keys() == set(bench.urls)
        for url in bench.urls:
            assert await weight_version(bench.http, url) == "incomplete-51"
            await bench.generate(url, 1)
        await bench.push("distributed", models[1], 52)

    run(body)


def test_servers_that_a_dead_trainer_left_paused_take_the_next_push(run, models) -> None:
    async def body(bench: Bench) -> None:
        for url in bench.urls:
            await rename(bench.http, url, "incomplete-59")
            for path, content in (("/pause_generation", {"mode": "retract"}), ("/begin_weight_update", {})):
                await bench.http.call(url, path, content, timeout_sec=30, admin=True)
        await bench.push("distributed", models[0], 60)
        for url in bench.urls:
            await bench.check_serves(url, models[0], 60)

    run(body)


def test_without_the_key_nothing_changes(run, models, sglang_keys) -> None:
    async def body(bench: Bench) -> None:
        await bench.push("tensor", models[0], 65)
        async with Http(Keys(sglang_keys.api, "wrong")) as http:
            result = await bench.sync("disk", http).push(bench.urls, models[1].tensors(), 66, allow_running=True)
        assert result.acknowledged == ()
        assert all("401" in reason for reason in result.failed.values()), result.failed
        for url in bench.urls:
            await bench.check_serves(url, models[0], 65)

    run(body)


def test_a_worker_that_missed_a_version_catches_up(run, models) -> None:
    async def body(bench: Bench) -> None:
        (url, other) = bench.urls
        sync = bench.sync("disk")
        assert not await sync.catch_up(url)  # nothing has been pushed
        await bench.push("tensor", models[0], 70)
        result = await sync.push([other], models[1].tensors(), 71, allow_running=True)
        assert result.acknowledged == (other,)
        assert await sync.catch_up(url)
        await bench.check_serves(url, models[1], 71)
        assert not await bench.sync("distributed").catch_up(url)

    run(body)


def test_a_full_disk_is_one_error_and_the_old_weights_remain(run, models) -> None:
    async def body(bench: Bench) -> None:
        sync = bench.sync("disk")
        await sync.push(bench.urls, models[0].tensors(), 80, allow_running=True)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (BUCKET_BYTES // 2, before[1]))
        try:
            with pytest.raises(OSError, match=r"cannot write .*version_00000081.*\d+ bytes are free"):
                await sync.push(bench.urls, models[1].tensors(), 81, allow_running=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [path.name for path in bench.folder.iterdir()] == ["version_00000080"]
        for url in bench.urls:
            await bench.check_serves(url, models[0], 80)
        assert await sync.catch_up(bench.urls[0])  # from the folder of the version before
        await sync.push(bench.urls, models[1].tensors(), 82, allow_running=True)
        assert [path.name for path in bench.folder.iterdir()] == ["version_00000082"]

    run(body)


def test_memory_is_released_and_comes_back_with_the_next_weights(run, models) -> None:
    """On a CPU the servers answer and release nothing: here are the calls, their tags and their order."""

    class Recording(Http):
        heard: list[tuple[str, Any]] = []

        async def call(self, url: str, path: str, body: Any = None, **rest: Any) -> Any:
            if url.endswith(first_port):
                self.heard.append((path, body))
            return await super().call(url, path, body, **rest)

    first_port = ""

    async def body(bench: Bench) -> None:
        nonlocal first_port
        first_port = bench.urls[0].rpartition(":")[2]
        await bench.push("tensor", models[0], 90)
        async with Recording(bench.http._keys) as http:
            sync = bench.sync("tensor", http)
            assert await sync.release_memory(bench.urls) == {}
            assert {await weight_version(bench.http, url) for url in bench.urls} == {"released"}
            result = await sync.push(bench.urls, models[1].tensors(), 91, allow_running=False)
        assert result.acknowledged == bench.urls
        for url in bench.urls:
            await bench.check_serves(url, models[1], 91)
        moved = [
            (path, list(body["tags"]) if "tags" in body else None)
            for path, body in Recording.heard
            if path.endswith(("memory_occupation", "_generation"))
        ]
        assert moved[:3] == [
            ("/pause_generation", None),
            ("/release_memory_occupation", ["kv_cache", "weights"]),
            ("/pause_generation", None),
        ]
        assert moved[3:] == [
            ("/resume_memory_occupation", ["weights"]),
            ("/resume_memory_occupation", ["kv_cache"]),
            ("/continue_generation", None),
        ]
        paths = [path for path, _ in Recording.heard]
        updates = [i for i, path in enumerate(paths) if path == "/update_weights_from_tensor"]
        first, second = (i for i, path in enumerate(paths) if path == "/resume_memory_occupation")
        assert first < updates[0] and updates[-1] < second

    run(body)


def kill_server(url: str) -> None:
    """SIGKILL to all its processes."""
    port = urlsplit(url).port
    (listener,) = {c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    server = psutil.Process(listener)
    for process in [server, *server.children(recursive=True)]:
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_server_is_left_out_and_comes_back_with_the_version(run, models) -> None:
    async def body(bench: Bench) -> None:
        victim, survivor = bench.urls
        await bench.push("tensor", models[0], 100)
        # After some buckets, before the last: 26 tensors in about 8 buckets.
        tensors = models[1].tensors_until(12, lambda: kill_server(victim))
        async with asyncio.timeout(60):
            result = await bench.sync("distributed").push(bench.urls, tensors, 101, allow_running=True)
        assert result.acknowledged == (survivor,)
        assert result.failed.keys() == {victim}
        await bench.check_serves(survivor, models[1], 101)
        sync = bench.sync("disk")
        result = await sync.push(bench.urls, models[0].tensors(), 102, allow_running=True)  # it is dead still
        assert result.acknowledged == (survivor,)
        while not await sync.catch_up(victim):
            await asyncio.sleep(1)
        await bench.check_serves(victim, models[0], 102)

    run(body)
