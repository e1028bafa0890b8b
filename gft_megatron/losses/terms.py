"""What is added to a loss, each with a coefficient that may change in every step.

    loss_t + kl_coef * k(log p_t, log p_ref,t) - entropy_coef * H_t + mix_coef * other_loss_t (recorded responses only)

`with_terms` makes one loss of these; to the training loop it is a loss like any other.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor

from gft_megatron.losses.importance import recorded_tokens
from gft_megatron.losses.inputs import (
    LossFn,
    LossInputs,
    LossOutput,
    batch_sums,
    default_schedules,
    is_token_local,
    natural_responses,
    required_inputs,
)
from gft_megatron.losses.reduce import masked_mean

KlEstimator = Literal["k1", "k2", "k3"]
_MIX = "mix_"


def kl_penalty(inputs: LossInputs, estimator: KlEstimator) -> Tensor:  # [n]
    """An estimate of KL(policy || reference) from each token, 0 on masked positions.

    With d = log p_ref - log p: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d (J. Schulman, "Approximating KL Divergence",
    2020; GRPO, arXiv:2402.03300 Eq. 4, has k3). As values k1 and k3 are unbiased for tokens that the policy drew, and
    k3 is never negative. As a loss, k2 has the gradient of the divergence; that of k1 is 0 on average, so k1 is for
    rewards; that of k3 is the gradient of KL(reference || policy).

    Raises:
        ValueError: there are no ref_log_probs, or no such estimator.
    """
    if inputs.ref_log_probs is None:
        raise ValueError("the KL penalty needs LossInputs.ref_log_probs, which is None")
    mask = inputs.mask.bool()
    difference = (inputs.ref_log_probs - inputs.log_probs).where(mask, 0.0)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2.0
    if estimator == "k3":
        return torch.expm1(difference) - difference
    raise ValueError(f"the KL estimator is {estimator!r}; it has to be k1, k2 or k3")


def with_terms(
    loss: LossFn, *, terms: Collection[str], kl_estimator: KlEstimator = "k3", mix: LossFn | None = None
) -> LossFn:
    """`loss` with more terms, whose coefficients become keyword arguments beside its hyper-parameters.

    Args:
        terms: which of kl_coef, entropy_coef, mix_coef to take.
        mix: the loss that mix_coef multiplies. Its hyper-parameters are keyword arguments too; one that `loss` has as
            well goes to both.
    """
    names = {part: _hyper_names(part) for part in (loss, mix) if part is not None}

    def combined(inputs: LossInputs, **hyper: Any) -> LossOutput:
        mask = inputs.mask.bool()
        total, metrics = loss(_of_part(inputs, ""), **{k: v for k, v in hyper.items() if k in names[loss]})
        metrics = dict(metrics)
        if "kl_coef" in hyper:
            penalty = kl_penalty(inputs, kl_estimator)
            total = total + hyper["kl_coef"] * penalty
            metrics["ref_kl_mean"] = masked_mean(penalty, mask)
        if "entropy_coef" in hyper:
            assert inputs.entropy is not None
            total = total - hyper["entropy_coef"] * inputs.entropy.where(mask, 0.0)
        if "mix_coef" in hyper:
            assert mix is not None
            recorded = dataclasses.replace(_of_part(inputs, _MIX), mask=recorded_tokens(inputs))
            other, other_metrics = mix(recorded, **{k: v for k, v in hyper.items() if k in names[mix]})
            total = total + hyper["mix_coef"] * other
            share = masked_mean(recorded.mask.float(), mask)  # its metrics are means over these tokens only
            metrics |= {_MIX + name: value * share for name, value in other_metrics.items()}
            metrics[_MIX + "loss"] = masked_mean(other, mask)
        return total, metrics

    needs = required_inputs(loss) | ({"ref_log_probs"} if "kl_coef" in terms else set())
    needs |= {"entropy"} if "entropy_coef" in terms else set()
    parts = [loss] if mix is None else [loss, mix]
    combined.requires = needs.union(*map(required_inputs, parts))  # type: ignore[attr-defined]
    combined.is_token_local = all(map(is_token_local, parts))  # type: ignore[attr-defined]
    combined.trains_on = natural_responses(loss)  # type: ignore[attr-defined]
    combined.schedules = default_schedules(loss)  # type: ignore[attr-defined]
    if any(map(batch_sums, parts)):
        combined.batch_sums = _joined_sums(loss, mix)  # type: ignore[attr-defined]
    return combined


def _joined_sums(loss: LossFn, mix: LossFn | None) -> Any:
    def sums(inputs: LossInputs) -> dict[str, Tensor]:
        of_loss, of_mix = batch_sums(loss), None if mix is None else batch_sums(mix)
        found = {} if of_loss is None else dict(of_loss(inputs))
        if of_mix is not None:
            recorded = dataclasses.replace(inputs, mask=recorded_tokens(inputs))
            found |= {_MIX + name: value for name, value in of_mix(recorded).items()}
        return found

    return sums


def _of_part(inputs: LossInputs, prefix: str) -> LossInputs:
    """The same with the batch sums that belong to one part, under their own names."""
    if inputs.batch is None:
        return inputs
    own = {
        name.removeprefix(prefix): value
        for name, value in inputs.batch.items()
        if name.startswith(_MIX) == bool(prefix)
    }
    return dataclasses.replace(inputs, batch=own)


def _hyper_names(loss: LossFn) -> set[str]:
    parameters = inspect.signature(loss).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
