"""The one place where per-token losses become one number: sum over tokens / number of valid tokens, both global.

Each micro-batch hands (sum, number of tokens) to Megatron-Core, which sums the numbers of all micro-batches,
context-parallel and data-parallel ranks and divides the gradients once (finalize_model_grads, `num_tokens`). Hence
micro-batching, packing and the parallel layout cannot change the loss.
"""

from __future__ import annotations

from torch import Tensor


def token_sum(per_token_loss: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # [n], [n] -> [], [] int32
    """Sum of the per-token loss (0 on masked positions) and the number of unmasked tokens of one micro-batch."""
    return per_token_loss.sum(), mask.bool().sum().int()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:  # [n], [n] -> []
    """Detached mean over unmasked tokens, 0 where there is none. Masked values reach nothing, not even as NaN."""
    mask = mask.bool()
    return values.detach().where(mask, 0.0).sum() / mask.sum().clamp(min=1)
