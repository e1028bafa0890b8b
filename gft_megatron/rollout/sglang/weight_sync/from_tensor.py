"""Weights inside the update request: for servers on the trainer's own machine.

On a GPU they share it: the request holds CUDA IPC handles of one bucket, which the server opens and copies from. On a
CPU it holds the bytes themselves, in base64: several times a bucket of memory, and good for small models and tests.

SGLang wants the tensors as a pickle. This is the one file of the project that makes one; nothing here reads any. A
handle means nothing on another machine, and the bytes would travel in the most expensive way: such servers are refused.
"""

from __future__ import annotations

import base64
import pickle
import socket
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from multiprocessing.reduction import ForkingPickler
from urllib.parse import urlsplit

from torch import Tensor

from gft_megatron.rollout.sglang.http import Http
from gft_megatron.rollout.sglang.weight_sync.buckets import Bucket, buckets
from gft_megatron.rollout.sglang.weight_sync.from_distributed import num_ranks
from gft_megatron.rollout.sglang.weight_sync.interface import WeightSync
from gft_megatron.rollout.sglang.weight_sync.update import Update, to_its_end

_LOAD_SEC = 120.0


class FromTensor(WeightSync):
    """Server and trainer on one machine."""

    _in_session = True

    def __init__(self, http: Http, *, bucket_bytes: int, compare_checksums: bool = False) -> None:
        super().__init__(http, compare_checksums=compare_checksums)
        self._bucket_bytes = bucket_bytes

    async def _push(
        self, urls: Sequence[str], tensors: Iterator[tuple[str, Tensor]], version: int, allow_running: bool
    ) -> tuple[Update, int]:
        for url in urls:
            refuse_other_machine(url)
        num_bytes = 0
        async with (
            self._updating(urls, version, allow_running) as update,
            aclosing(buckets(tensors, self._bucket_bytes)) as filled,
        ):
            async for bucket in filled:
                await to_its_end(self._deliver(update, bucket))
                num_bytes += bucket.data.nbytes
        return update, num_bytes

    async def _deliver(self, update: Update, bucket: Bucket) -> None:
        serialized = _serialize(bucket)

        async def load(url: str) -> None:
            body = {
                "serialized_named_tensors": [serialized] * await num_ranks(self._http, url),
                "flush_cache": bucket.is_last,
            }
            path = "/update_weights_from_tensor"
            await self._http.call(url, path, body, timeout_sec=_LOAD_SEC, admin=True)

        await update.on_each(load)

    async def close(self) -> None:
        """Nothing is kept between updates."""


def refuse_other_machine(url: str) -> None:
    """
    Raises:
        ValueError: the server is not on this machine.
    """
    host = urlsplit(url).hostname
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(found[0], found[1]) as probe:
        try:
            probe.bind(found[4])
        except OSError:
            raise ValueError(
                f"{url} is not on this machine: weights as tensors go to servers beside the trainer only; "
                "use 'distributed' or 'disk'"
            ) from None


def _serialize(bucket: Bucket) -> str:
    if bucket.data.is_cuda:
        content = ForkingPickler.dumps(bucket.tensors())
    else:
        # ForkingPickler would pass file descriptors, which end a server that is not our child. Copies, because a view
        # is pickled with the whole buffer under it.
        content = pickle.dumps([(name, tensor.clone()) for name, tensor in bucket.tensors()])
    return base64.b64encode(content).decode()
