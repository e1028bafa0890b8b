"""Group Fine-Tuning (arXiv:2604.14258).

    loss_t = -A * c_t * log p_t,    c_t = p_t if p_t < tau else 1    (c_t is a constant)        Eq. 5, Eq. 21

The gradient of plain cross-entropy, seen as a policy gradient, carries a factor 1/p. Multiplying by p removes it (DFT);
GFT removes it only for unlikely tokens, so that 1/p stays below 1/tau. A is the group advantage of the response. The
paper's Eq. 22 prints another 1/pi, which is not the gradient of Eq. 21; the official code implements Eq. 21, as here.

Not done here: the reduction over tokens (reduce.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gft_megatron.groups import Source
from gft_megatron.losses.coefficients import coefficient_shares
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, token_local, trains_on
from gft_megatron.losses.reduce import masked_mean


def rectify(log_probs: Tensor, tau: Tensor | float) -> Tensor:  # [n] -> [n]
    """c_t = p_t below tau, 1 from tau on; detached. tau = 0 is cross-entropy, tau > 1 is DFT."""
    probs = log_probs.detach().exp()
    return torch.where(probs < tau, probs, 1.0)


@trains_on("mixed")
@token_local
@requires("advantages")
def gft(
    inputs: LossInputs,
    *,
    tau: float = 0.7,
    tau_expert: float | None = None,
    tau_teacher: float | None = None,
    tau_self: float | None = None,
) -> LossOutput:
    """GFT's per-token loss [n], 0 on masked positions.

    Args:
        tau: rectify tokens less likely than this. 0.7 is best in the paper's sweep (Fig. 6); the released script of
            the 1.5B model has 0.1. 0 turns rectification off.
        tau_expert: tau of expert responses (default: tau).
        tau_teacher: tau of teacher responses (default: tau).
        tau_self: tau of the model's own samples (default: tau). 0 leaves them unrectified: a token drawn with
            probability p and then weighted by p again is pushed away with p^2 when it was wrong.

    Raises:
        ValueError: a tau is out of range.
    """
    assert inputs.advantages is not None
    given = {"tau": tau, "tau_expert": tau_expert, "tau_teacher": tau_teacher, "tau_self": tau_self}
    for name, value in given.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{name} is {value}; it has to be at least 0 (0 turns rectification off)")
    by_source = [tau] * len(Source)
    for source, override in ((Source.EXPERT, tau_expert), (Source.TEACHER, tau_teacher), (Source.SELF, tau_self)):
        if override is not None:
            by_source[source] = override
    taus = inputs.log_probs.new_tensor(by_source)[inputs.sources]  # [num_sequences]

    mask = inputs.mask.bool()
    log_probs = inputs.log_probs.where(mask, 0.0)
    coefficient = rectify(log_probs, taus[inputs.sequence_ids])
    loss = -inputs.advantages[inputs.sequence_ids] * coefficient * log_probs
    metrics = {
        "coefficient_mean": masked_mean(coefficient, mask),
        "rectified_frac": masked_mean((coefficient < 1).float(), mask),
        **coefficient_shares(coefficient, mask),
    }
    return loss.where(mask, 0.0), metrics
