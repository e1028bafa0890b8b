"""What the command line of bench_loss.py asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gft_megatron import ops


@dataclass(frozen=True, kw_only=True)
class BenchLoss:
    """What to measure."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    dtype: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16")
    """Data types of the logits, one table section each."""
    vocab_size: int = 151_936
    """Columns of the logits, all ranks together."""
    num_tokens: int = 432
    """Rows of the logits."""
    tensor_parallel: tuple[int, ...] = (1,)
    """Numbers of ranks that the vocabulary is split over."""
    entropy: bool = False
    """Also measure ours with a differentiable entropy."""
    linear: bool = False
    """Measure the output layer and the loss together."""
    hidden_size: int = 896
    """Width of the hidden states, for --linear."""
    ignored_share: float = 0.0
    """Share of ignored tokens in further rows of --linear."""
    threads: int = 1
    """CPU threads of each rank."""
    repeats: int = 7
    """Rounds."""
    json: Path | None = None
    """File for the rows."""
    markdown: Path | None = None
    """File for the table."""
    picture: Path | None = None
    """File for a picture of the table (.png or .svg)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_tokens", "hidden_size", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for size in self.tensor_parallel:
            if size < 1 or self.vocab_size % size:
                raise ValueError(f"--vocab-size {self.vocab_size} cannot be split over --tensor-parallel {size}")
            if self.device == "cuda" and size > torch.cuda.device_count():
                raise ValueError(
                    f"--device cuda --tensor-parallel {size} needs {size} GPUs, found {torch.cuda.device_count()}"
                )
        if self.device == "cuda" and not ops.build_info()["cuda"]:
            raise ValueError("--device cuda, but gft_megatron was built without its CUDA operators: build it again")
        for name in ("json", "markdown", "picture"):
            path = getattr(self, name)
            if path is not None and not path.parent.is_dir():  # said now and not when everything has been measured
                raise ValueError(f"--{name} {path}: there is no folder {path.parent}")
        if self.linear and set(self.tensor_parallel) != {1}:
            raise ValueError("--linear measures one rank: leave --tensor-parallel at 1")
        if not 0.0 <= self.ignored_share < 1.0:
            raise ValueError(f"--ignored-share must be in [0, 1), got {self.ignored_share}")
        if self.ignored_share and not self.linear:
            raise ValueError("--ignored-share belongs to --linear: the other operators have no way to ignore a token")
