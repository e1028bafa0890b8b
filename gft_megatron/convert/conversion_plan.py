"""What a conversion will write and what it needs, known before anything is written."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gft_megatron.convert.mapping import (
    expected_hf_shapes,
    megatron_parameters,
)
from gft_megatron.convert.model_shape import ModelShape

Progress = Callable[[int], None]
"""Called with the bytes that were just written; by any worker."""

HF_PART = "hf"
"""Folder of the configuration and tokenizer beside a converted checkpoint."""


@dataclass(frozen=True)
class Plan:
    """What a conversion will write, and what it needs."""

    num_parameters: int
    num_tensors: int
    """Hugging Face tensors."""
    num_bytes: int
    """Of weights, written."""
    dtypes: dict[str, int]
    """Name -> tensors of the output in it."""
    vocab_size: int
    padded_vocab_size: int
    memory: int
    """Bytes of weights that all workers hold together at most."""
    disk_free: int

    def check_disk(self, target: Path) -> None:
        """Raises OSError if the weights do not fit."""
        if self.num_bytes > self.disk_free:
            raise OSError(f"{target} needs {self.num_bytes} bytes, but {self.disk_free} are free there")


def make_plan(
    shape: ModelShape, dtypes: Counter[torch.dtype], *, num_bytes: int, padded: int, memory: int, target: Path
) -> Plan:
    existing = next(parent for parent in target.resolve().parents if parent.exists())
    return Plan(
        num_parameters=len(megatron_parameters(shape)),
        num_tensors=len(expected_hf_shapes(shape)),
        num_bytes=num_bytes,
        dtypes={str(dtype).removeprefix("torch."): count for dtype, count in dtypes.items()},
        vocab_size=shape.vocab_size,
        padded_vocab_size=padded,
        memory=memory,
        disk_free=shutil.disk_usage(existing).free,
    )


def check_workers(workers: int) -> None:
    if workers < 1:
        raise ValueError(f"--workers {workers}: it has to be at least 1")
