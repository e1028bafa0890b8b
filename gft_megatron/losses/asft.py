"""Anchored Supervised Fine-Tuning (arXiv:2509.23753; formula as in the authors' code).

    loss_t = -sg(p_t) log p_t + lam KL(p_ref || p)_t

DFT, held to the reference model by the divergence over the whole vocabulary at each token. The direction matters:
KL(p_ref || p) keeps mass wherever the reference has some; the paper reports that the reverse one collapses. lam is 0.05
in the paper and 0.1 in older code.
"""

from __future__ import annotations

import math

from gft_megatron.losses.dft import dft
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, token_local
from gft_megatron.losses.reduce import masked_mean


@token_local
@requires("ref_kl")
def asft(inputs: LossInputs, *, lam: float = 0.05) -> LossOutput:
    """ASFT's per-token loss [n], 0 on masked positions; differentiable in `ref_kl` too. Every response counts.

    Args:
        lam: weight of the divergence; 0 is DFT.

    Raises:
        ValueError: lam is out of range.
    """
    if not 0 <= lam < math.inf:
        raise ValueError(f"lam is {lam}; it has to be finite and at least 0 (0 is DFT)")
    assert inputs.ref_kl is not None
    loss, metrics = dft(inputs)
    divergence = inputs.ref_kl.where(inputs.mask.bool(), 0.0)
    return loss + lam * divergence, {**metrics, "ref_kl_mean": masked_mean(divergence, inputs.mask)}
