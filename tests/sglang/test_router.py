"""Requests through a real sglang-router, everything else straight to the servers.

GFT_SGLANG_ROUTER_PYTHON names the interpreter of an environment with sglang-router; without it, this is skipped.
"""

import asyncio
import os
import socket
import subprocess

import pytest
from engine_site import Site, check_whole, model_facts, request

from gft_megatron.rollout.engine import RequestAborted
from gft_megatron.rollout.sglang.http import Http, WorkerError
from gft_megatron.rollout.sglang.loads import read_load


@pytest.fixture(scope="module")
def facts(sglang_model):
    return model_facts(sglang_model)


@pytest.fixture(scope="module")
def router_url(sglang_launcher, sglang_keys, tmp_path_factory):
    python = os.environ.get("GFT_SGLANG_ROUTER_PYTHON")
    if python is None:
        pytest.skip("GFT_SGLANG_ROUTER_PYTHON names no environment with sglang-router")
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        port, metrics_port = first.getsockname()[1], second.getsockname()[1]
    command = [python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += [
        "--worker-urls",
        *sglang_launcher.urls,
        "--policy",
        "cache_aware",
        "--prometheus-port",
        str(metrics_port),
    ]
    # Retries would be second samples. /health generates, and fails while a server is paused.
    command += ["--disable-retries", "--health-check-endpoint", "/ready"]
    log = tmp_path_factory.mktemp("router") / "log"
    url = f"http://127.0.0.1:{port}"

    async def until_it_knows_both():
        async with Http(sglang_keys) as http, asyncio.timeout(60):
            while True:
                try:
                    workers = (await http.call(url, "/workers", timeout_sec=5))["workers"]
                    if [worker["is_healthy"] for worker in workers] == [True, True]:
                        return
                except WorkerError:
                    assert router.poll() is None, log.read_text()
                await asyncio.sleep(0.1)

    with log.open("w") as output:
        router = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            asyncio.run(until_it_knows_both())
            yield url
        finally:
            router.kill()
            router.wait()


def test_samples_come_through_a_router(sglang_workers, sglang_keys, facts, router_url):
    async def main():
        async with Site(sglang_workers, sglang_keys, facts, router_url=router_url) as site:
            before = [(await read_load(site.http, url, timeout_sec=30)).mark for url in sglang_workers]
            asked = [request((5, i, *range(20))) for i in range(16) for _ in range(4)]
            for one, completion in zip(asked, await asyncio.gather(*map(site.engine.generate, asked)), strict=True):
                check_whole(completion, one, facts)
            after = [(await read_load(site.http, url, timeout_sec=30)).mark for url in sglang_workers]
            assert all(b != a for b, a in zip(before, after, strict=True)), "it sent all to one server"
            figures = site.engine.figures()
            assert figures["retries"] == 0 and figures["workers_healthy"] == 2
            asked = [request((5, i), new=1900, temperature=0.0) for i in range(8)]
            tasks = [asyncio.create_task(site.engine.generate(one)) for one in asked]
            async with asyncio.timeout(30):
                while await site.on_servers() < 8:
                    await asyncio.sleep(0.02)
            await site.engine.abort()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(end, RequestAborted) for end in ends), ends
            await site.until_idle()

    asyncio.run(main())
