"""Dynamic Fine-Tuning (arXiv:2508.05629).

    loss_t = -sg(p_t) * log p_t        Eq. 9

p_t must be a constant: -p log p with its own gradient pushes unlikely expert tokens further down.
"""

from __future__ import annotations

from gft_megatron.losses.coefficients import coefficient_shares
from gft_megatron.losses.inputs import LossInputs, LossOutput, token_local
from gft_megatron.losses.reduce import masked_mean


@token_local
def dft(inputs: LossInputs) -> LossOutput:
    """DFT's per-token loss [n], 0 on masked positions. Every response counts, whatever its reward."""
    mask = inputs.mask.bool()
    log_probs = inputs.log_probs.where(mask, 0.0)
    coefficient = log_probs.detach().exp()
    loss = -coefficient * log_probs
    metrics = {"coefficient_mean": masked_mean(coefficient, mask), **coefficient_shares(coefficient, mask)}
    return loss.where(mask, 0.0), metrics
