"""What is added to a loss: the divergence from a reference, an entropy bonus, a loss of recorded responses.

    loss_t = main_t + kl_coef KL_t - entropy_coef H_t + mix_coef mix_t

`with_terms` makes one loss of them, with everything declared that its parts declare (inputs.py), so that whoever calls
it need not know that it has parts.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from gft_megatron.losses.importance import recorded_tokens
from gft_megatron.losses.inputs import (
    LossFn,
    LossInputs,
    LossOutput,
    ResponseFigures,
    batch_sums,
    batch_sums_of_policy,
    batch_sums_of_this_batch,
    default_schedules,
    is_of_token_mean,
    is_token_local,
    natural_comparison,
    natural_responses,
    required_inputs,
    response_figures,
)
from gft_megatron.losses.reduce import masked_mean

KlEstimator = Literal["k1", "k2", "k3"]
COEFFICIENTS = ("kl_coef", "entropy_coef", "mix_coef")


def kl_penalty(inputs: LossInputs, *, estimator: KlEstimator = "k3") -> Tensor:  # [n]
    """KL(p || p_ref) as estimated from the tokens at hand, 0 on masked positions; differentiable in log_probs.

    With d = log p_t - log p_ref,t of a token drawn from p (Schulman, "Approximating KL Divergence"):

        k1 = d                  unbiased; may be negative
        k2 = d^2 / 2            biased; its gradient d * grad log p is, in the mean, that of KL(p || p_ref)
        k3 = exp(-d) - 1 + d    unbiased, never negative; its gradient is, in the mean, that of KL(p_ref || p)

    The gradient of k1 itself is 0 in the mean and would be noise; it has k2's here, which is what taking k1 from the
    reward does. k3 is GRPO's. On tokens that the policy did not draw, recorded ones, none of them estimates a
    divergence, but all pull towards the reference.

    Raises:
        ValueError: the estimator is unknown, or there are no ref_log_probs.
    """
    if estimator not in get_args(KlEstimator):
        raise ValueError(f"kl_estimator is {estimator!r}; it has to be one of {', '.join(get_args(KlEstimator))}")
    if inputs.ref_log_probs is None:
        raise ValueError("the KL penalty needs LossInputs.ref_log_probs, which is None")
    mask = inputs.mask.bool()
    difference = (inputs.log_probs - inputs.ref_log_probs.detach()).where(mask, 0.0)
    if estimator == "k3":
        return (-difference).expm1() + difference
    half_square = difference.square() / 2.0
    return half_square if estimator == "k2" else difference.detach() + (half_square - half_square.detach())


def entropy_bonus(inputs: LossInputs) -> Tensor:  # [n]
    """Entropy of the policy at each token, 0 on masked positions; differentiable.

    Raises:
        ValueError: there is no entropy.
    """
    if inputs.entropy is None:
        raise ValueError("the entropy bonus needs LossInputs.entropy, which is None")
    return inputs.entropy.where(inputs.mask.bool(), 0.0)


def recorded_only(inputs: LossInputs) -> LossInputs:
    """The inputs with own samples masked out."""
    return dataclasses.replace(inputs, mask=recorded_tokens(inputs))


def with_terms(
    main: LossFn, *, terms: Collection[str], kl_estimator: KlEstimator = "k3", mix: LossFn | None = None
) -> LossFn:
    """`main` with these terms added.

    Args:
        terms: which of kl_coef, entropy_coef and mix_coef there are. Each is a keyword-only parameter of the result,
            without a default, so that it can change from step to step.
        mix: the loss of mix_coef, applied to the tokens of recorded responses and to no others.

    The result takes the hyper-parameters of `main` and of `mix`; one that both have goes to both. The metrics of `mix`
    have the prefix "mix_" and count own tokens as 0. It is made for the responses that `main` is made for, and recorded
    ones where there is a `mix`. What is told of whole responses (`tells_responses`) is what `main` has to tell. A
    coefficient out of range is a ValueError then, an unknown term is one here.
    """
    unknown = set(terms) - set(COEFFICIENTS)
    if unknown or ("mix_coef" in terms) != (mix is not None):
        raise ValueError(
            f"terms are {sorted(terms)} with mix={mix}; known: {', '.join(COEFFICIENTS)}, the last with a mix"
        )
    parts: dict[str, LossFn] = {"main": main} if mix is None else {"main": main, "mix": mix}

    def combined(inputs: LossInputs, **hyper: Any) -> LossOutput:
        coefficients = {name: _coefficient(name, hyper.pop(name)) for name in terms}
        for_mix = {} if mix is None else {name: value for name, value in hyper.items() if name in _hyper_names(mix)}
        for_main = {name: value for name, value in hyper.items() if name in _hyper_names(main) or name not in for_mix}
        loss, metrics = main(_part_of_batch(inputs, "main"), **for_main)
        if "kl_coef" in terms:
            divergence = kl_penalty(inputs, estimator=kl_estimator)
            loss = loss + coefficients["kl_coef"] * divergence
            metrics = {**metrics, "kl_mean": masked_mean(divergence, inputs.mask)}
        if "entropy_coef" in terms:  # the training loop reports the entropy of every loss
            loss = loss - coefficients["entropy_coef"] * entropy_bonus(inputs)
        if mix is not None:
            recorded = recorded_only(inputs)
            mixed, mixed_metrics = mix(_part_of_batch(recorded, "mix"), **for_mix)
            loss = loss + coefficients["mix_coef"] * mixed
            share = masked_mean(recorded.mask.float(), inputs.mask)
            metrics = {**metrics, "mix_loss": masked_mean(mixed, inputs.mask)}
            metrics |= {f"mix_{name}": value * share for name, value in mixed_metrics.items()}
        return loss, metrics

    combined.__name__ = main.__name__
    required = frozenset().union(*map(required_inputs, parts.values()))
    required |= {"ref_log_probs"} if "kl_coef" in terms else set()
    required |= {"entropy"} if "entropy_coef" in terms else set()
    combined.requires = required  # type: ignore[attr-defined]
    combined.is_token_local = all(map(is_token_local, parts.values()))  # type: ignore[attr-defined]
    only_own = natural_responses(main) == "own"
    combined.trains_on = "mixed" if only_own and mix else natural_responses(main)  # type: ignore[attr-defined]
    combined.compares = natural_comparison(main)  # type: ignore[attr-defined]
    combined.of_token_mean = any(map(is_of_token_mean, parts.values()))  # type: ignore[attr-defined]
    combined.schedules = default_schedules(main)  # type: ignore[attr-defined]
    combined.response_figures = _response_figures_of(main)  # type: ignore[attr-defined]
    if any(map(batch_sums, parts.values())):
        combined.batch_sums = _sums_of(parts)  # type: ignore[attr-defined]
        combined.batch_sums_of_policy = any(map(batch_sums_of_policy, parts.values()))  # type: ignore[attr-defined]
        this_batch = any(map(batch_sums_of_this_batch, parts.values()))
        combined.batch_sums_of_this_batch = this_batch  # type: ignore[attr-defined]
    return combined


def _coefficient(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it has to be finite")
    return value


def _hyper_names(loss: LossFn) -> set[str]:
    parameters = inspect.signature(loss).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}


def _sums_of(parts: dict[str, LossFn]) -> Any:
    def sums(inputs: LossInputs) -> dict[str, Tensor]:
        together = {}
        for part, loss in parts.items():
            of_part = batch_sums(loss)
            if of_part is not None:
                seen = recorded_only(inputs) if part == "mix" else inputs
                together |= {f"{part}_{name}": value for name, value in of_part(seen).items()}
        return together

    return sums


def _part_of_batch(inputs: LossInputs, part: str) -> LossInputs:
    return dataclasses.replace(inputs, batch=_part_of_sums(inputs.batch, part))


def _part_of_sums(batch: Mapping[str, Tensor] | None, part: str) -> dict[str, Tensor] | None:
    prefix = f"{part}_"
    own = {name.removeprefix(prefix): value for name, value in (batch or {}).items() if name.startswith(prefix)}
    return own or None


def _response_figures_of(main: LossFn) -> ResponseFigures | None:
    figures = response_figures(main)
    if figures is None:
        return None

    def of_main(sample_nll: Tensor, batch: Mapping[str, Tensor] | None, **hyper: Any) -> dict[str, float]:
        known = {name: value for name, value in hyper.items() if name in _hyper_names(main)}
        return figures(sample_nll, _part_of_sums(batch, "main"), **known)

    return of_main
