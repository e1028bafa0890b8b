"""Single-stage supervised and reinforcement fine-tuning, SRFT (arXiv:2506.19767).

    loss_t = -0.5 sg(exp(-H_t)) log p_t - min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)    recorded responses
    loss_t = -0.1 sg(exp(H_t)) log p_t    own samples that did better than their group (A > 0)
    loss_t = log p_t                      own samples that did worse (A < 0)

H_t is the entropy of the policy at the token, r_t = p_t / p_old,t. A demonstration counts less where the policy is
unsure, so that it does not scatter it further; a good sample counts more there, which keeps the entropy from falling.

Contradictions. Readers of the authors' code find exp(+H) in front of the demonstrations: entropy_sign = "code".
Whether H is a token's or a mean the paper does not say; here it is the token's, as those readers show it of the code.
The samples' rewards are 1 and -1 there; here the sign of the advantage says which they are, so a group of equal
rewards has no third or fourth term. Nobody knows with what probability a demonstration was drawn; r_t here compares
with the policy at the start of the rollout's updates. The paper takes an expectation over demonstrations and one over
samples; here one token mean covers both.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from gft_megatron.losses.importance import clipped_surrogate, log_ratios, own_tokens, recorded_tokens
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, token_local, trains_on
from gft_megatron.losses.reduce import masked_mean


@trains_on("mixed")
@token_local
@requires("advantages", "old_log_probs", "entropy")
def srft(
    inputs: LossInputs,
    *,
    sft_weight: float = 0.5,
    positive_weight: float = 0.1,
    entropy_sign: Literal["paper", "code"] = "paper",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> LossOutput:
    """SRFT's per-token loss [n], 0 on masked positions.

    Args:
        sft_weight: weight of the demonstrations' cross-entropy.
        positive_weight: weight of own samples with A > 0.
        entropy_sign: "paper": demonstrations weigh exp(-H); "code": exp(H).
        clip_low: ratios of demonstrations below 1 - clip_low are clipped.
        clip_high: ratios of demonstrations above 1 + clip_high are clipped.

    Raises:
        ValueError: a hyper-parameter is out of range.
    """
    for name, value in (("sft_weight", sft_weight), ("positive_weight", positive_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it has to be finite and at least 0")
    if entropy_sign not in ("paper", "code"):
        raise ValueError(f"entropy_sign is {entropy_sign!r}; it has to be 'paper' or 'code'")
    assert inputs.advantages is not None and inputs.entropy is not None
    own, recorded = own_tokens(inputs), recorded_tokens(inputs)
    ratio = log_ratios(inputs, recorded).exp()
    surrogate, metrics = clipped_surrogate(inputs, ratio, recorded, clip_low=clip_low, clip_high=clip_high)

    entropy = inputs.entropy.detach().where(inputs.mask.bool(), 0.0)
    demonstration = sft_weight * (entropy if entropy_sign == "code" else -entropy).exp()
    advantage = inputs.advantages[inputs.sequence_ids]
    sample = torch.where(advantage > 0, positive_weight * entropy.exp(), -(advantage < 0).float())
    weight = demonstration.where(recorded, 0.0) + sample.where(own, 0.0)
    loss = surrogate - weight * inputs.log_probs.where(inputs.mask.bool(), 0.0)
    return loss, {
        "clipped_frac": metrics["clipped_frac"],
        "sft_weight_mean": masked_mean(demonstration.where(recorded, 0.0), inputs.mask),
        "sample_weight_mean": masked_mean(sample.where(own, 0.0), inputs.mask),
    }
