"""What every loss reads: per-token numbers of one packed micro-batch, and the checks that name a missing one."""

from __future__ import annotations

import dataclasses
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

    def at(self, positions: Tensor) -> LossInputs:  # [m] int64
        """The inputs of some of the tokens; their sequences keep their numbers."""
        per_token = {name: getattr(self, name) for name in _PER_TOKEN}
        return dataclasses.replace(
            self, **{name: values[positions] for name, values in per_token.items() if values is not None}
        )

    def with_policy(self, log_probs: Tensor, entropy: Tensor | None) -> LossInputs:  # [n], [n]
        """What the policy says of these tokens. Where no old policy was given, it is the policy itself."""
        old = log_probs.detach() if self.old_log_probs is None else self.old_log_probs
        return dataclasses.replace(self, log_probs=log_probs, entropy=entropy, old_log_probs=old)


_PER_TOKEN = (
    "log_probs",
    "mask",
    "sequence_ids",
    "entropy",
    "old_log_probs",
    "ref_log_probs",
    "rollout_log_probs",
    "ref_kl",
    "token_groups",
)


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


def token_local(loss: LossFn) -> LossFn:
    """Declare that a token's loss depends on that token's numbers and on constants of its sequence only.

    The training loop may then compute it for some tokens at a time (`linear_loss`).
    """
    loss.is_token_local = True  # type: ignore[attr-defined]
    return loss


def is_token_local(loss: LossFn) -> bool:
    """Whether this loss was declared `token_local`."""
    return getattr(loss, "is_token_local", False)
