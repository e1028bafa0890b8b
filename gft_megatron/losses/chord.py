"""CHORD-phi (arXiv:2508.11408; formula as in the authors' code): GRPO on own samples, weighted SFT on recorded ones.

    loss_t = (1 - mu) * GRPO's loss_t             on own samples
    loss_t = -mu * sg(p_t (1 - p_t)) * log p_t    on expert and teacher responses, whatever their reward

p (1 - p) leaves alone what the model knows (p near 1) and what would tear it from its policy (p near 0).

Two things differ from the paper. It takes a mean over each of the two parts; here one token mean covers both, so that
the share of recorded tokens acts on the balance as mu does. Its advantages compare own samples with one another; here
they are those of the whole group, recorded responses included. Groups with equal rewards still have the second line's
gradient: --no-skip-zero-variance keeps them.
"""

from __future__ import annotations

from gft_megatron.losses.grpo import grpo
from gft_megatron.losses.importance import recorded_tokens
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, token_local, trains_on
from gft_megatron.losses.reduce import masked_mean


@trains_on("mixed")
@token_local
@requires("advantages", "old_log_probs")
def chord_phi(inputs: LossInputs, *, mu: float = 0.1, clip_low: float = 0.2, clip_high: float = 0.2) -> LossOutput:
    """CHORD-phi's per-token loss [n], 0 on masked positions.

    Args:
        mu: share of the recorded responses: 0 is GRPO, 1 is p (1 - p)-weighted cross-entropy.
        clip_low: ratios of own samples below 1 - clip_low are clipped.
        clip_high: ratios of own samples above 1 + clip_high are clipped.
    """
    if not 0 <= mu <= 1:
        raise ValueError(f"mu is {mu}; it has to be between 0 and 1")
    own_loss, metrics = grpo(inputs, clip_low=clip_low, clip_high=clip_high)
    log_probs = inputs.log_probs.where(recorded_tokens(inputs), 0.0)
    constant = log_probs.detach()
    phi = constant.exp() * -constant.expm1()  # 1 - p has no digits left near p = 1
    loss = (1.0 - mu) * own_loss - mu * phi * log_probs
    return loss, {**metrics, "phi_mean": masked_mean(phi, inputs.mask)}
