"""Group Sequence Policy Optimization (arXiv:2507.18071 Eq. 5 to 7).

    loss_t = -min(s_i A, clip(s_i, 1 - clip_low, 1 + clip_high) A),    s_i = exp(mean over t of log(p_t / p_old,t))

A response is clipped as a whole, by the geometric mean of its tokens' ratios. The gradient goes through that mean: each
of the response's tokens adds s_i / |y_i| to it, |y_i| times, so a token's own s_i is differentiable in its log-prob.

The paper averages over responses; with the token mean of this project a response weighs by its length.
"""

from __future__ import annotations

from gft_megatron.losses.importance import clipped_surrogate, log_ratios, own_tokens
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, trains_on
from gft_megatron.losses.sequences import sequence_means


@trains_on("own")
@requires("advantages", "old_log_probs")
def gspo(inputs: LossInputs, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> LossOutput:
    """GSPO's clipped surrogate of its response at each token [n], 0 on masked positions and on recorded responses.

    Args:
        clip_low: ratios below 1 - clip_low are clipped.
        clip_high: ratios above 1 + clip_high are clipped.

    Raises:
        ValueError: a hyper-parameter is out of range, or the tokens of a response are not adjacent.
        RuntimeError: CUDA inputs without the CUDA operators.
    """
    own = own_tokens(inputs)
    log_ratio = log_ratios(inputs, own)
    means = sequence_means(inputs, log_ratio, own)[inputs.sequence_ids]
    # The value is that of the response, the gradient the token's own.
    ratio = (means + (log_ratio - log_ratio.detach())).exp()
    return clipped_surrogate(inputs, ratio, own, clip_low=clip_low, clip_high=clip_high)
