"""Weights by broadcast: one process group of the trainer's first rank and all servers, a bucket at a time.

The group is formed for one update and given up after it: what died or restarted in between is of no consequence, and
servers hold no buffers for it while they generate. A server lost in the middle breaks the group; the others form a new
one, are sent the bucket again, and go on.

`torch.distributed`'s default group and its registry of groups are not touched: the group is the bare backend, under the
keys by which torch's own constructor, which the servers call, finds its peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import Literal
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor

from gft_megatron.rollout.sglang.addresses import own_address
from gft_megatron.rollout.sglang.http import FailureKind, Http, WorkerError
from gft_megatron.rollout.sglang.weight_sync.buckets import Bucket, buckets
from gft_megatron.rollout.sglang.weight_sync.interface import WeightSync
from gft_megatron.rollout.sglang.weight_sync.update import Update, to_its_end

_POLL_SEC = 0.002
_ANSWER_SEC = 60.0  # from the end of a broadcast to the server's word that it has loaded the bucket


class FromDistributed(WeightSync):
    """NCCL between GPUs, gloo between CPUs."""

    _in_session = True

    def __init__(
        self,
        http: Http,
        *,
        backend: Literal["nccl", "gloo"],
        bucket_bytes: int,
        bucket_timeout_sec: float = 60.0,
        compare_checksums: bool = False,
    ) -> None:
        """
        Args:
            bucket_timeout_sec: for forming the group, and for each broadcast. A server that stands still costs it once.
        """
        super().__init__(http, compare_checksums=compare_checksums)
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._bucket_timeout_sec = bucket_timeout_sec
        self._group: _Group | None = None

    async def _push(
        self, urls: Sequence[str], tensors: Iterator[tuple[str, Tensor]], version: int, allow_running: bool
    ) -> tuple[Update, int]:
        num_bytes = 0
        async with self._updating(urls, version, allow_running) as update:
            try:
                async with aclosing(buckets(tensors, self._bucket_bytes)) as filled:
                    async for bucket in filled:
                        await to_its_end(self._deliver(update, bucket))
                        num_bytes += bucket.data.nbytes
            finally:
                await to_its_end(self._disband())
        return update, num_bytes

    async def _deliver(self, update: Update, bucket: Bucket) -> None:
        """Until every live worker has the bucket.

        Ends: each turn but the last finds a worker that fails, or one that refuses a broken broadcast, or to form a
        group, for the first time.
        """
        waiting = set(update.live)
        refused: set[str] = set()
        refused_group: set[str] = set()
        while waiting & set(update.live):
            if self._group is None:
                self._group = await _form(
                    self._http, update, refused_group, backend=self._backend, timeout_sec=self._bucket_timeout_sec
                )
                if self._group is None:
                    continue
            broken, answers = await self._broadcast(self._group, bucket)
            for url, error in answers.items():
                if error is None:
                    waiting.discard(url)
                elif broken and error.kind is FailureKind.REFUSED and url not in refused:
                    refused.add(url)  # perhaps only because of another that broke the group
                else:
                    update.fail(url, str(error))
            if broken or any(answers.values()):
                await self._disband()

    async def _broadcast(self, group: _Group, bucket: Bucket) -> tuple[bool, dict[str, WorkerError | None]]:
        """Whether the broadcast broke, and what each worker said."""
        calls = {url: asyncio.ensure_future(self._receive(group, url, bucket)) for url in group.urls}
        try:
            broken = not await group.send(bucket.data, self._bucket_timeout_sec)
            if broken:
                await group.leave()  # whoever still waits for our bytes stops now
            await asyncio.wait(calls.values(), timeout=_ANSWER_SEC)
            return broken, {url: _outcome(url, call) for url, call in calls.items()}
        finally:
            for call in calls.values():
                call.cancel()

    async def _receive(self, group: _Group, url: str, bucket: Bucket) -> WorkerError | None:
        body = {
            "names": bucket.names,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
            "shapes": bucket.shapes,
            "group_name": group.name,
            "load_format": "flattened_bucket",
            "flush_cache": bucket.is_last,
        }
        timeout_sec = self._bucket_timeout_sec + _ANSWER_SEC
        path = "/update_weights_from_distributed"
        try:
            await self._http.call(url, path, body, timeout_sec=timeout_sec, admin=True)
        except WorkerError as error:
            return error
        return None

    async def _disband(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            await group.leave()
            await asyncio.gather(*(_forget(self._http, url, group.name) for url in group.urls))

    async def close(self) -> None:
        """Between updates there is no group."""


def _outcome(url: str, call: asyncio.Future[WorkerError | None]) -> WorkerError | None:
    if call.done():
        return call.result()
    return WorkerError(url, FailureKind.TIMED_OUT, f"has not loaded a bucket {_ANSWER_SEC:g} s after it was sent")


class _Group:
    """This process, as rank 0, and workers."""

    def __init__(self, name: str, urls: tuple[str, ...], store: dist.Store, backend: dist.Backend) -> None:
        self.name = name
        self.urls = urls
        self._store: dist.Store | None = store
        self._backend: dist.Backend | None = backend

    async def send(self, data: Tensor, timeout_sec: float) -> bool:
        """False: the group is broken."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            work = self._backend.broadcast([data], options)
            deadline = time.monotonic() + timeout_sec
            while not work.is_completed() and time.monotonic() < deadline:
                await asyncio.sleep(_POLL_SEC)
            if not work.is_completed():
                self._backend.abort()
                return False
            work.wait()
        except RuntimeError:
            return False
        return True

    async def leave(self) -> None:
        """Close our connections."""
        backend, self._backend, self._store = self._backend, None, None
        if backend is not None:
            # Its destructor waits for what has not ended yet.
            await asyncio.to_thread(_drop, [backend])


def _drop(last_references: list[object]) -> None:
    last_references.clear()


async def _form(http: Http, update: Update, refused: set[str], *, backend: str, timeout_sec: float) -> _Group | None:
    """A group of all live workers, or None: then some of them have failed.

    Args:
        refused: those that have refused before, perhaps only because another did not come; it grows.
    """
    urls = update.live
    sizes: dict[str, int] = {}

    async def ask_size(url: str) -> None:
        sizes[url] = await num_ranks(http, url)

    await update.on_each(ask_size)
    if update.live != urls:
        return None
    address = _own_address(urls)
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        port = listener.getsockname()[1]
        timeout = timedelta(seconds=timeout_sec)
        # Listening on this one address: anybody who can connect to a store may read and write it.
        store = dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
        )
    name = f"weights-{uuid.uuid4().hex}"
    first_ranks = [1 + sum(list(sizes.values())[:i]) for i in range(len(urls))]
    world_size = 1 + sum(sizes.values())

    failed: dict[str, WorkerError] = {}  # in the order in which they did

    async def join(url: str, first_rank: int) -> None:
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": first_rank,
            "world_size": world_size,
            "group_name": name,
            "backend": backend,
        }
        try:
            await http.call(url, "/init_weights_update_group", body, timeout_sec=timeout_sec + 10, admin=True)
        except WorkerError as error:
            failed[url] = error

    joining = asyncio.gather(*(join(url, sizes_before) for url, sizes_before in zip(urls, first_ranks, strict=True)))
    try:
        own = await asyncio.to_thread(_make_backend, backend, store, name, world_size, address, timeout)
    except RuntimeError as error:
        own, reason = None, str(error)
        store = None  # the others give up when it is gone
    await joining
    if own is None and not failed:
        for url in urls:
            update.fail(url, f"no process group with the trainer: {reason}")
    guilty = [url for url, error in failed.items() if error.kind is not FailureKind.REFUSED or url in refused]
    for url in guilty or list(failed)[:1]:  # the others have waited for this one
        update.fail(url, str(failed[url]))
    refused.update(failed)
    group = None if own is None else _Group(name, urls, store, own)
    if group is not None and not failed:
        return group
    if group is not None:
        await group.leave()
    await asyncio.gather(*(_forget(http, url, name) for url in urls if url not in failed))
    return None


def _make_backend(
    name: str, store: dist.Store, group_name: str, world_size: int, address: str, timeout: timedelta
) -> dist.Backend:
    """Blocks until all have come. The prefixes are those of torch.distributed's `_new_process_group_helper`, below the
    one that SGLang puts before it."""
    device = "cuda" if name == "nccl" else "cpu"
    for prefix in (group_name, f"{group_name}/", f"{device}/"):
        store = dist.PrefixStore(prefix, store)
    if name == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, 0, world_size, options)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, 0, world_size, options)


async def _forget(http: Http, url: str, name: str) -> None:
    with contextlib.suppress(WorkerError):  # it has no such group, or is no more
        path = "/destroy_weights_update_group"
        await http.call(url, path, {"group_name": name}, timeout_sec=_ANSWER_SEC, admin=True)


def _own_address(urls: Sequence[str]) -> str:
    """An address of this machine that all these servers reach: one that it sends from to one of them."""
    servers = [urlsplit(url) for url in urls]
    own = [own_address(server.hostname, server.port) for server in servers]
    # Servers beside us reach the address that others need; the others do not reach loopback.
    return next((address for address in own if not ipaddress.ip_address(address).is_loopback), own[0])


async def num_ranks(http: Http, url: str) -> int:
    """Tensor-parallel ranks of a server: each of them takes the weights.

    Raises:
        WorkerError
    """
    answer = await http.call(url, "/server_info", timeout_sec=_ANSWER_SEC)
    try:
        return int(answer["tp_size"])
    except (TypeError, KeyError, ValueError) as error:
        raise WorkerError(url, FailureKind.MALFORMED, "/server_info names no tp_size") from error
