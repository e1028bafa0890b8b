"""The trainer's weights to SGLang servers: by files, by broadcast, or as tensors in a request."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from gft_megatron.rollout.sglang.http import Http
from gft_megatron.rollout.sglang.weight_sync.from_disk import FromDisk
from gft_megatron.rollout.sglang.weight_sync.from_distributed import FromDistributed
from gft_megatron.rollout.sglang.weight_sync.from_tensor import FromTensor
from gft_megatron.rollout.sglang.weight_sync.interface import SyncResult, WeightSync

__all__ = ["SyncResult", "WeightSync", "build_weight_sync"]


def build_weight_sync(
    name: Literal["disk", "distributed", "tensor"],
    http: Http,
    *,
    folder: Path,
    source_folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    bucket_bytes: int = 1 << 30,
    compare_checksums: bool = False,
) -> WeightSync:
    """
    Args:
        folder: for "disk": under the same path for trainer and servers, ours alone.
        source_folder: for "disk": Hugging Face folder whose configuration and tokenizer go with the weights.
        dtype, device: of the weights.
        bucket_bytes: the most that is held of the weights at a time, beside one parameter; a larger tensor is held
            whole.
        compare_checksums: see `WeightSync`.

    Raises:
        ValueError: no such name.
    """
    if name == "disk":
        return FromDisk(
            http,
            folder=folder,
            source_folder=source_folder,
            dtype=dtype,
            bucket_bytes=bucket_bytes,
            compare_checksums=compare_checksums,
        )
    if name == "distributed":
        backend = "nccl" if device.type == "cuda" else "gloo"
        return FromDistributed(http, backend=backend, bucket_bytes=bucket_bytes, compare_checksums=compare_checksums)
    if name == "tensor":
        return FromTensor(http, bucket_bytes=bucket_bytes, compare_checksums=compare_checksums)
    raise ValueError(f"weight sync {name!r}: expected disk, distributed or tensor")
