"""CHORD (arXiv:2508.11408; formulas as in the authors' code): GRPO on own samples, SFT on recorded ones.

    loss_t = (1 - mu) * GRPO's loss_t         on own samples
    loss_t = -mu * phi_t * log p_t            on expert and teacher responses, whatever their reward

CHORD-mu has phi = 1 and lets mu fall from 0.9 to 0.05 along a cosine of 200 steps: from imitation to exploration.
CHORD-phi has phi = sg(p_t (1 - p_t)) and mu = 0.1: p (1 - p) leaves alone what the model knows (p near 1) and what
would tear it from its policy (p near 0).

The paper writes one expectation for each of the two parts, and so does its code: each is divided by its own tokens. The
default here is one token mean over both, so that the share of recorded tokens acts on the balance as mu does;
separate_means = True is the other reading. Advantages compare own samples with one another, as there (--advantage-scope
source), and a single demonstration with nothing, so that groups with equal own rewards keep the second line's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gft_megatron.losses.coefficients import coefficient_shares
from gft_megatron.losses.grpo import grpo
from gft_megatron.losses.importance import own_tokens, recorded_tokens
from gft_megatron.losses.inputs import LossInputs, LossOutput, over_batch, requires, scheduled, token_local, trains_on
from gft_megatron.losses.reduce import masked_mean
from gft_megatron.losses.sequences import count_tokens


def part_sums(inputs: LossInputs) -> dict[str, Tensor]:
    """Tokens of own and of recorded responses."""
    return {
        "own_tokens": count_tokens(inputs, own_tokens(inputs)),
        "recorded_tokens": count_tokens(inputs, recorded_tokens(inputs)),
    }


@scheduled(mu="0.9:0.05:cosine:200")
@trains_on("mixed", compares="source")
@token_local
@requires("advantages", "old_log_probs")
@over_batch(part_sums, of_policy=False)
def chord_mu(
    inputs: LossInputs,
    *,
    mu: float = 0.9,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    separate_means: bool = False,
) -> LossOutput:
    """CHORD-mu's per-token loss [n], 0 on masked positions.

    Args:
        mu: share of the recorded responses: 0 is GRPO, 1 is cross-entropy.
        clip_low: ratios of own samples below 1 - clip_low are clipped.
        clip_high: ratios of own samples above 1 + clip_high are clipped.
        separate_means: a mean over own tokens and one over recorded tokens, instead of one over all.

    Raises:
        ValueError: a hyper-parameter is out of range.
    """
    nll = -inputs.log_probs.where(recorded_tokens(inputs), 0.0)
    return _mixed(inputs, nll, mu=mu, clip_low=clip_low, clip_high=clip_high, separate_means=separate_means)


@trains_on("mixed", compares="source")
@token_local
@requires("advantages", "old_log_probs")
@over_batch(part_sums, of_policy=False)
def chord_phi(
    inputs: LossInputs,
    *,
    mu: float = 0.1,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    separate_means: bool = False,
) -> LossOutput:
    """CHORD-phi's per-token loss [n], 0 on masked positions.

    Args:
        mu: share of the recorded responses: 0 is GRPO, 1 is p (1 - p)-weighted cross-entropy.
        clip_low: ratios of own samples below 1 - clip_low are clipped.
        clip_high: ratios of own samples above 1 + clip_high are clipped.
        separate_means: a mean over own tokens and one over recorded tokens, instead of one over all.

    Raises:
        ValueError: a hyper-parameter is out of range.
    """
    recorded = recorded_tokens(inputs)
    log_probs = inputs.log_probs.where(recorded, 0.0)
    constant = log_probs.detach()
    phi = constant.exp() * -constant.expm1()  # 1 - p has no digits left near p = 1
    loss, metrics = _mixed(
        inputs, -phi * log_probs, mu=mu, clip_low=clip_low, clip_high=clip_high, separate_means=separate_means
    )
    shares = coefficient_shares(phi, inputs.mask, "phi", chosen=recorded)
    return loss, {**metrics, "phi_mean": masked_mean(phi, inputs.mask), **shares}


def _mixed(
    inputs: LossInputs,
    recorded_loss: Tensor,  # [n], 0 on own samples
    *,
    mu: float,
    clip_low: float,
    clip_high: float,
    separate_means: bool,
) -> LossOutput:
    if not 0 <= mu <= 1:
        raise ValueError(f"mu is {mu}; it has to be between 0 and 1")
    own_loss, metrics = grpo(inputs, clip_low=clip_low, clip_high=clip_high)
    if not separate_means:
        return (1.0 - mu) * own_loss + mu * recorded_loss, metrics
    assert inputs.batch is not None
    counts = torch.stack([inputs.batch["own_tokens"], inputs.batch["recorded_tokens"]])
    own_scale, recorded_scale = (counts.sum() / counts.clamp(min=1)).float().unbind()
    return (1.0 - mu) * own_scale * own_loss + mu * recorded_scale * recorded_loss, metrics
