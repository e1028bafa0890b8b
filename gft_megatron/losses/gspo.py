"""Group Sequence Policy Optimization (arXiv:2507.18071 Eq. 5 to 7).

    loss_t = -min(s_i A, clip(s_i, 1 - clip_low, 1 + clip_high) A),    s_i = exp(mean over t of log(p_t / p_old,t))

A response is clipped as a whole, by the geometric mean of its tokens' ratios, and the gradient goes through that mean.
So a token's loss depends on its whole response, which must lie on one rank: no context parallelism.

The paper averages over responses; with the token mean of this project a response weighs by its length.
"""

from __future__ import annotations

from torch import Tensor

from gft_megatron.losses.importance import clipped_surrogate, log_ratios, own_tokens
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires
from gft_megatron.ops import segment_means


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
    means = segment_means(log_ratios(inputs, own), _segment_ids(inputs, own), len(inputs.sources), mask=own)
    # float64: backward adds up as many equal numbers as the response has tokens.
    ratio = means.double()[inputs.sequence_ids].exp().float()
    return clipped_surrogate(inputs, ratio, own, clip_low=clip_low, clip_high=clip_high)


def _segment_ids(inputs: LossInputs, own: Tensor) -> Tensor:  # [n] bool -> [n] int64
    """Padding belongs to sequence 0 wherever it lies, but segment ids must not decrease: it joins the one before."""
    before = inputs.sequence_ids.where(own, 0).cummax(0).values
    return inputs.sequence_ids.where(own, before)
