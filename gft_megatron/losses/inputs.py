"""What every loss reads: per-token numbers of one packed micro-batch, and the checks that name a missing one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
    top_entropy: Tensor | None = None  # [n] fp32: entropy of the TOP_K likeliest tokens (losses/eaft.py)
    ref_kl: Tensor | None = None  # [n] fp32
    token_groups: Tensor | None = None  # [n] int64
    batch: Mapping[str, Tensor] | None = None
    """Sums over the global batch of what the loss's `batch_sums` says of each micro-batch, fp64. None: these inputs are
    the whole batch."""
    context_sum: Callable[[Tensor], Tensor] | None = None
    """Adds up a tensor over the ranks that hold the other parts of these sequences (context parallelism)."""

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

    def with_ref_kl(self, ref_kl: Tensor) -> LossInputs:  # [n]
        """With each token's divergence from the reference."""
        return dataclasses.replace(self, ref_kl=ref_kl)

    def with_top_entropy(self, top_entropy: Tensor) -> LossInputs:  # [n]
        """With the entropy of each token's likeliest alternatives."""
        return dataclasses.replace(self, top_entropy=top_entropy)


_PER_TOKEN = (
    "log_probs",
    "mask",
    "sequence_ids",
    "entropy",
    "old_log_probs",
    "ref_log_probs",
    "rollout_log_probs",
    "top_entropy",
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


BatchSums = Callable[["LossInputs"], dict[str, Tensor]]


def over_batch(sums: BatchSums, *, of_policy: bool = True, of_this_batch: bool = False) -> Callable[[LossFn], LossFn]:
    """Declare sums over the whole sequences of the global batch that a loss reads as `LossInputs.batch`.

    Args:
        sums: fp64 scalars or vectors of fixed length of one micro-batch, whole sequences counted once
            (`sequence_sums`). The training loop adds them up over micro-batches and data-parallel ranks, from a
            forward-only pass or from the step before; where it did not, they are taken of the loss's own inputs.
        of_policy: False: `sums` does not look at log_probs, entropy or ref_kl, so that no forward pass is needed.
        of_this_batch: True: the sums of the step before mean nothing for this one.
    """

    def decorate(loss: LossFn) -> LossFn:
        @functools.wraps(loss)
        def with_batch(inputs: LossInputs, **hyper: Any) -> LossOutput:
            if inputs.batch is None:
                inputs = dataclasses.replace(inputs, batch=sums(inputs))
            return loss(inputs, **hyper)

        with_batch.batch_sums = sums  # type: ignore[attr-defined]
        with_batch.batch_sums_of_policy = of_policy  # type: ignore[attr-defined]
        with_batch.batch_sums_of_this_batch = of_this_batch  # type: ignore[attr-defined]
        return with_batch

    return decorate


def of_token_mean(loss: LossFn) -> LossFn:
    """Declare that a loss divides by counts of its own, on the understanding that the mean over all tokens follows."""
    loss.of_token_mean = True  # type: ignore[attr-defined]
    return loss


def is_of_token_mean(loss: LossFn) -> bool:
    """Whether another reduction than the token mean would change what this loss means."""
    return getattr(loss, "of_token_mean", False)


def batch_sums(loss: LossFn) -> BatchSums | None:
    """What this loss was declared to need of the global batch."""
    return getattr(loss, "batch_sums", None)


def batch_sums_of_policy(loss: LossFn) -> bool:
    """Whether these sums take a forward pass; False also for a loss without any."""
    return getattr(loss, "batch_sums_of_policy", False)


def batch_sums_of_this_batch(loss: LossFn) -> bool:
    """Whether these sums cannot be replaced by those of the step before."""
    return getattr(loss, "batch_sums_of_this_batch", False)


ResponseFigures = Callable[..., dict[str, float]]


def tells_responses(figures: ResponseFigures) -> Callable[[LossFn], LossFn]:
    """Declare what a loss has to say of the responses of the global batch that no mean over tokens says.

    Args:
        figures: called after each step with the mean negative log-likelihood of every response ([n] fp64), with the
            sums over the batch that the loss read (see `over_batch`; None: those of these responses), and with the
            loss's hyper-parameters. It returns metrics.
    """

    def decorate(loss: LossFn) -> LossFn:
        loss.response_figures = figures  # type: ignore[attr-defined]
        return loss

    return decorate


def response_figures(loss: LossFn) -> ResponseFigures | None:
    """What this loss was declared to tell of responses."""
    return getattr(loss, "response_figures", None)


Responses = Literal["recorded", "mixed", "own"]


Comparison = Literal["group", "source"]


def trains_on(responses: Responses, *, compares: Comparison | None = None) -> Callable[[LossFn], LossFn]:
    """Declare whose responses a loss is made for, hence what its groups are made of where nobody says.

    Args:
        compares: whether advantages compare a response with its whole group or with those of its own source; default
            the latter for a loss of own samples, beside which others may stand for another loss.
    """

    def decorate(loss: LossFn) -> LossFn:
        loss.trains_on = responses  # type: ignore[attr-defined]
        loss.compares = compares or ("source" if responses == "own" else "group")  # type: ignore[attr-defined]
        return loss

    return decorate


def natural_responses(loss: LossFn) -> Responses:
    """Whose responses this loss was declared to be made for; recorded ones where it was not."""
    return getattr(loss, "trains_on", "recorded")


def natural_comparison(loss: LossFn) -> Comparison:
    """With whom the advantages of this loss were declared to compare a response."""
    return getattr(loss, "compares", "group")


def scheduled(**schedules: str) -> Callable[[LossFn], LossFn]:
    """Declare the schedules (schedules.py) that a paper gives its hyper-parameters; --schedule overrides them."""

    def decorate(loss: LossFn) -> LossFn:
        loss.schedules = schedules  # type: ignore[attr-defined]
        return loss

    return decorate


def default_schedules(loss: LossFn) -> dict[str, str]:
    """The schedules that this loss was declared to have."""
    return getattr(loss, "schedules", {})


def token_local(loss: LossFn) -> LossFn:
    """Declare that a token's loss depends on that token's numbers and on constants of its sequence only.

    The training loop may then compute it for some tokens at a time (`linear_loss`).
    """
    loss.is_token_local = True  # type: ignore[attr-defined]
    return loss


def is_token_local(loss: LossFn) -> bool:
    """Whether this loss was declared `token_local`."""
    return getattr(loss, "is_token_local", False)
