"""The trainer's weights to SGLang servers, by files, by broadcast or by tensors in a request."""

from __future__ import annotations

from gft_megatron.rollout.sglang.weight_sync.from_disk import FromDisk
from gft_megatron.rollout.sglang.weight_sync.interface import SyncResult, WeightSync

__all__ = ["FromDisk", "SyncResult", "WeightSync"]
