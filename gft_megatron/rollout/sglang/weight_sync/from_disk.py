"""Weights through a folder that trainer and servers share: written once, read by every worker.

Workers generate with the old weights while the new ones are written, and pause only to read them. A version's folder is
there whole or not at all (convert/hf_writer.py). The current one stays, for workers that are restarted.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gft_megatron.convert.hf_writer import HfFolderWriter
from gft_megatron.rollout.sglang.http import Http
from gft_megatron.rollout.sglang.weight_sync.interface import WeightSync
from gft_megatron.rollout.sglang.weight_sync.update import Update, to_its_end

_OURS = re.compile(r"version_\d{8}|\.version_\d{8}\.(partial|previous)")
_LOAD_SEC = 1800.0  # a large model from a shared file system


class FromDisk(WeightSync):
    """FOLDER/version_00000007/: a Hugging Face folder."""

    _in_session = False

    def __init__(
        self,
        http: Http,
        *,
        folder: Path,
        source_folder: Path,
        dtype: torch.dtype,
        bucket_bytes: int,
        compare_checksums: bool = False,
    ) -> None:
        """
        Args:
            folder: under the same path for trainer and servers. Ours alone.
            source_folder: Hugging Face folder whose configuration and tokenizer the written ones get.
            dtype: what the weights are written in.
            bucket_bytes: of a weight file, which is held in memory while it is made.
        """
        super().__init__(http, compare_checksums=compare_checksums)
        self._folder = folder.resolve()
        self._source_folder = source_folder
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._current: int | None = None

    async def _push(
        self, urls: Sequence[str], tensors: Iterator[tuple[str, Tensor]], version: int, allow_running: bool
    ) -> tuple[Update, int]:
        num_bytes = await self._write(tensors, version)
        self._current = version
        async with self._updating(urls, version, allow_running) as update:
            await update.on_each(self._load)
        await asyncio.to_thread(self._remove_others)
        return update, num_bytes

    async def _write(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> int:
        num_bytes = 0
        with HfFolderWriter(
            self._path(version),
            source_folder=self._source_folder,
            dtype=self._dtype,
            max_shard_bytes=self._bucket_bytes,
        ) as writer:
            for name, tensor in tensors:  # in this thread: each may be a collective
                await to_its_end(asyncio.to_thread(writer.add, name, tensor))
                num_bytes += tensor.numel() * self._dtype.itemsize
                del tensor  # before the next is made
            await to_its_end(asyncio.to_thread(writer.publish))
        return num_bytes

    async def _load(self, url: str) -> None:
        body = {"model_path": str(self._path(self._current)), "flush_cache": True}
        await self._http.call(url, "/update_weights_from_disk", body, timeout_sec=_LOAD_SEC, admin=True)

    async def catch_up(self, url: str) -> bool:
        async with self._lock:
            if self._current is None:
                return False
            async with self._updating([url], self._current, allow_running=True) as update:
                await update.on_each(self._load)
            return url in update.acknowledged

    async def close(self) -> None:
        """The folder of the current version stays."""

    def _path(self, version: int) -> Path:
        return self._folder / f"version_{version:08d}"

    def _remove_others(self) -> None:
        """Folders of older versions, and what killed processes have left of theirs."""
        current = self._path(self._current)
        for path in self._folder.iterdir():
            if _OURS.fullmatch(path.name) and path != current:
                shutil.rmtree(path, ignore_errors=True)
