"""Weights by broadcast to servers that fail: who cannot take part is left out, and nobody else.

The servers are threads of this process with torch's own side of the group; tests/sglang has real ones.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from gft_megatron.rollout.sglang.http import FailureKind, WorkerError
from gft_megatron.rollout.sglang.weight_sync.from_distributed import FromDistributed

URLS = ("http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3")
TENSORS = [("a", torch.arange(5.0)), ("b", torch.ones(2, 3))]


class Servers:
    """In the place of `Http`: servers that answer as SGLang 0.5.23 does. `fault(url, path)` raises what is to fail."""

    def __init__(self, fault) -> None:
        self.fault = fault
        self.versions = dict.fromkeys(URLS, "default")
        self.groups: dict[tuple[str, str], dist.ProcessGroupGloo] = {}
        self.weights: dict[str, bytes] = {}

    async def call(self, url, path, body=None, **_):
        await self.fault(url, path)
        if path == "/server_info":
            return {"version": "0.5.23", "tp_size": 1}
        if path == "/model_info":
            return {"weight_version": self.versions[url]}
        if path == "/update_weight_version":
            self.versions[url] = body["new_version"]
        if path == "/init_weights_update_group":
            try:
                self.groups[url, body["group_name"]] = await asyncio.to_thread(join, body)
            except RuntimeError as error:
                raise WorkerError(url, FailureKind.REFUSED, f"{path} answered 400: {error}") from None
        if path == "/update_weights_from_distributed":
            num_bytes = sum(4 * torch.Size(shape).numel() for shape in body["shapes"])
            self.weights[url] = await asyncio.to_thread(receive, self.groups[url, body["group_name"]], num_bytes)
        if path == "/destroy_weights_update_group":
            del self.groups[url, body["group_name"]]


def join(body) -> dist.ProcessGroupGloo:
    """As torch's constructor does, which servers call; they would wait for half an hour."""
    timeout = timedelta(seconds=20)
    store = dist.TCPStore(body["master_address"], body["master_port"], None, False, timeout)
    for prefix in (body["group_name"], f"{body['group_name']}/", "cpu/"):
        store = dist.PrefixStore(prefix, store)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=body["master_address"])]
    return dist.ProcessGroupGloo(store, body["rank_offset"], body["world_size"], options)


def receive(group: dist.ProcessGroupGloo, num_bytes: int) -> bytes:
    data = torch.empty(num_bytes, dtype=torch.uint8)
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([data], options).wait()
    return data.numpy().tobytes()


def push(servers: Servers):
    sync = FromDistributed(servers, backend="gloo", bucket_bytes=1000, bucket_timeout_sec=1.0)
    return asyncio.run(asyncio.wait_for(sync.push(URLS, TENSORS, 7, allow_running=True), 60))


@pytest.mark.parametrize("kind", [FailureKind.REFUSED, FailureKind.BROKEN_OFF])
def test_a_server_that_cannot_join_the_group_takes_no_other_with_it(kind) -> None:
    async def fault(url, path):
        if path == "/init_weights_update_group" and url == URLS[1]:
            raise WorkerError(url, kind, "out of memory")

    servers = Servers(fault)
    result = push(servers)
    assert result.acknowledged == (URLS[0], URLS[2]) and list(result.failed) == [URLS[1]]
    assert "out of memory" in result.failed[URLS[1]]
    sent = b"".join(tensor.numpy().tobytes() for _, tensor in TENSORS)
    assert servers.weights == dict.fromkeys(result.acknowledged, sent)
    assert servers.versions == {URLS[0]: "7", URLS[1]: "incomplete-7", URLS[2]: "7"}
    assert not servers.groups, "a group is left on a server"


def test_servers_none_of_which_can_join_end_it_soon() -> None:
    tries = []

    async def fault(url, path):
        if path == "/init_weights_update_group":
            tries.append(url)
            raise WorkerError(url, FailureKind.REFUSED, "no gloo")

    result = push(Servers(fault))
    assert result.acknowledged == () and set(result.failed) == set(URLS)
    assert len(tries) <= 5, "each turn waits for the group's time-out"
