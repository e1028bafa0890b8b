"""SFT under other f-divergences than total variation ("Implicit Reward as the Bridge", arXiv:2507.00018).

    loss_t = -phi(r_t) / beta,    r_t = beta log(p_t / p_ref,t)

    phi(r) = r                total variation: cross-entropy but for a constant
    phi(r) = r - r^2 / 4      Pearson chi^2
    phi(r) = r / (1 + r)      squared Hellinger

DPO's implicit reward r holds for SFT too, but there the divergence from the reference becomes a constant and nothing
bounds the step. Another divergence leaves a weight phi'(r) in front of the gradient of cross-entropy, 1 where policy
and reference agree: less the further a token has risen; with Pearson below 0, back to the reference, from r = 2 on.

The paper's exact objectives are not known to us: these are the conjugates of IQ-Learn, token by token, divided by beta
to keep the gradient's size. The paper found less in them than in a smaller learning rate. Hellinger's phi has a pole at
r = -1; here it goes on as its tangent below r = -1/2, which bounds the weight by 4. beta's default is DPO's usual one,
not the paper's.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, token_local
from gft_megatron.losses.reduce import masked_mean

Divergence = Literal["total-variation", "pearson", "hellinger"]


@token_local
@requires("ref_log_probs")
def f_divergence(inputs: LossInputs, *, divergence: Divergence = "pearson", beta: float = 0.1) -> LossOutput:
    """-phi(r_t) / beta per token [n], 0 on masked positions. Every response counts, whatever its reward.

    Args:
        divergence: which phi.
        beta: scale of the implicit reward: the larger, the closer to the reference.

    Raises:
        ValueError: a hyper-parameter is out of range.
    """
    if divergence not in get_args(Divergence):
        raise ValueError(f"divergence is {divergence!r}; it has to be one of {', '.join(get_args(Divergence))}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}; it has to be finite and above 0")
    assert inputs.ref_log_probs is not None
    mask = inputs.mask.bool()
    reward = beta * (inputs.log_probs.where(mask, 0.0) - inputs.ref_log_probs.where(mask, 0.0))
    constant = reward.detach()
    if divergence == "total-variation":
        phi, slope = reward, torch.ones_like(constant)
    elif divergence == "pearson":
        phi, slope = reward - reward.square() / 4.0, 1.0 - constant / 2.0
    else:
        bounded = reward.clamp(min=-0.5)
        phi = bounded / (1.0 + bounded) + 4.0 * (reward - bounded)
        slope = 1.0 / (1.0 + constant.clamp(min=-0.5)).square()
    metrics = {
        "coefficient_mean": masked_mean(slope, mask),
        "implicit_reward_mean": masked_mean(constant, mask),
    }
    return -(phi / beta).where(mask, 0.0), metrics
