"""Supervised fine-tuning: cross-entropy on every response token, whatever the reward of the response.

loss_t = -log p_t
"""

from __future__ import annotations

from gft_megatron.losses.inputs import LossInputs, LossOutput, token_local


@token_local
def sft(inputs: LossInputs) -> LossOutput:
    """Cross-entropy [n], 0 on masked positions."""
    return -inputs.log_probs.where(inputs.mask.bool(), 0.0), {}
