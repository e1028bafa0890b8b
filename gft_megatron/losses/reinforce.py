"""REINFORCE on the model's own samples (Williams 1992), with the group's advantage for a reward.

    loss_t = -A log p_t

RLOO (arXiv:2402.14740) is this with --advantage-normalization leave-one-out. There is no ratio to an old policy: with
more than one optimizer step a rollout the later ones are off-policy, and only tis_clip takes notice of it.
"""

from __future__ import annotations

from gft_megatron.losses.importance import own_tokens, sampler_weight
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, token_local, trains_on


@trains_on("own")
@token_local
@requires("advantages")
def reinforce(inputs: LossInputs, *, tis_clip: float | None = None) -> LossOutput:
    """REINFORCE's per-token loss [n], 0 on masked positions and on recorded responses.

    Args:
        tis_clip: weigh each token by min(p / p_rollout, tis_clip), a constant; 2 is usual. Default: no weight.

    Raises:
        ValueError: tis_clip is out of range, or is set without rollout_log_probs.
    """
    assert inputs.advantages is not None
    own = own_tokens(inputs)
    weight, metrics = sampler_weight(inputs, inputs.log_probs, own, tis_clip)
    return -weight * inputs.advantages[inputs.sequence_ids] * inputs.log_probs.where(own, 0.0), metrics
