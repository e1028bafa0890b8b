"""The types that cross the rooms of the bench, and what its problems share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SAMPLED_ROWS = 8
LOGIT_STD = 3.0

COPY, GEMMS = "copy", "three bare GEMMs"
TORCH, OURS = "torch cross_entropy", "ours in place"
TORCH_LINEAR, LINEAR = "torch linear + cross_entropy", "linear_log_probs"


@dataclass(frozen=True)
class Row:
    """One line of the table, and of the JSON file; its fields are described in bench_loss.py."""

    name: str
    device: str
    dtype: str
    tensor_parallel: int
    seconds: float
    cpu_seconds: float | None
    gb_per_s: float | None
    floor_share: float | None
    peak_extra_bytes: int | None
    collectives: int
    max_abs_error: float | None

    @property
    def cost(self) -> float:
        """The time that ratios are made of: CPU-seconds count the work even where others use the machine too."""
        return self.seconds if self.cpu_seconds is None else self.cpu_seconds


@dataclass(frozen=True)
class Result:
    """What a candidate computed. The gradient is that of the mean over all tokens."""

    loss: Tensor | None  # [n], None where only its mean exists
    grad: Tensor  # [n, v/p], or [n, h]


@dataclass(frozen=True)
class Candidate:
    """One operator. `run` gets what `fresh` of its problem made; a candidate that computes no loss returns None."""

    name: str
    run: Callable[..., Result | None]
    with_entropy: bool = False
    floor: float | None = None  # the floor is this many times this candidate's time
    work: float = 1.0  # the share of the floor's work that this candidate cannot avoid
    ours: bool = False  # if not: an error leaves it out instead of ending the run


class Problem(Protocol):
    """Inputs of one data type on one rank, and who shall deal with them."""

    floor_bytes: int | None

    def fresh(self) -> tuple[Tensor, ...]:
        """The arguments of `Candidate.run`, unspoilt by the one before."""

    def candidates(self) -> Iterator[Candidate | str]:
        """Who takes part; a string says who does not, and why."""

    def expected(self, with_entropy: bool) -> tuple[Tensor, Result]:
        """Row numbers [k], and what stands there in float64: loss [k], gradient of the sum of the losses [k, ...]."""


def where_it_runs(name: str, device: str, build: Callable[[], Callable]) -> Candidate | str:
    if device != "cuda":
        return f"{name}: needs a GPU"
    try:
        return Candidate(name, build())
    except ImportError:
        return f"{name}: not installed"


def sampled_rows(live: Tensor) -> Tensor:  # [m] row numbers -> [at most SAMPLED_ROWS]
    at = torch.linspace(0, len(live) - 1, min(SAMPLED_ROWS, len(live))).round().long()
    return live[at.to(live.device)]


def dense_answer(logits: Tensor, labels: Tensor, with_entropy: bool) -> Result:  # [k, v] fp64
    leaf = logits.requires_grad_()
    log_p = leaf.log_softmax(-1)
    loss = -log_p.gather(-1, labels[:, None])[:, 0]
    if with_entropy:
        loss = loss + (log_p.exp() * log_p).sum(-1)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return Result(loss.detach(), grad)
