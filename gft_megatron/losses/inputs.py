"""What every loss reads: per-token numbers of one packed micro-batch, and the checks that name a missing one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

LossOutput = tuple[Tensor, dict[str, Tensor]]
LossFn = Callable[..., LossOutput]


@dataclass(frozen=True)
class LossInputs:
    """n tokens of num_sequences packed responses. Masked positions may hold any finite number."""

    log_probs: Tensor  # [n] fp32, differentiable: log p of each label under the policy
    mask: Tensor  # [n] bool or float: 1 on response tokens
    sequence_ids: Tensor  # [n] int64: index of the token's response in the [num_sequences] fields
    group_ids: Tensor  # [num_sequences] int64
    sources: Tensor  # [num_sequences] int64: 0 expert, 1 teacher, 2 self
    entropy: Tensor | None = None  # [n] fp32: entropy of the policy's next-token distribution
    advantages: Tensor | None = None  # [num_sequences] fp32
    old_log_probs: Tensor | None = None  # [n] fp32: under the policy at the start of this rollout's updates
    ref_log_probs: Tensor | None = None  # [n] fp32: under the frozen reference
    rollout_log_probs: Tensor | None = None  # [n] fp32: as the sampler reported them; NaN on recorded responses
    ref_kl: Tensor | None = None  # [n] fp32
    token_groups: Tensor | None = None  # [n] int64
    batch: Any = None  # statistics of the global batch; None: these inputs are the whole batch


def requires(*names: str) -> Callable[[LossFn], LossFn]:
    """Declare the optional `LossInputs` fields that a loss cannot do without.

    The loss then raises a ValueError that names a missing field, and the training loop asks `required_inputs` what it
    has to compute (group advantages, a forward-only pass for the old policy).
    """

    def decorate(loss: LossFn) -> LossFn:
        @functools.wraps(loss)
        def checked(inputs: LossInputs, **hyper: Any) -> LossOutput:
            for name in names:
                if getattr(inputs, name) is None:
                    raise ValueError(f"the loss {loss.__name__!r} needs LossInputs.{name}, which is None")
            return loss(inputs, **hyper)

        checked.requires = frozenset(names)  # type: ignore[attr-defined]
        return checked

    return decorate


def required_inputs(loss: LossFn) -> frozenset[str]:
    """The optional `LossInputs` fields that this loss was declared to need."""
    return getattr(loss, "requires", frozenset())
