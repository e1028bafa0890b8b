"""The one place where per-token losses become one number: sum over tokens / number of valid tokens, both global.

Each micro-batch hands (sum, number of tokens) to Megatron-Core, which sums the numbers of all micro-batches,
context-parallel and data-parallel ranks and divides the gradients once (finalize_model_grads, `num_tokens`). Hence
micro-batching, packing and the parallel layout cannot change the loss. Other means are weights of the responses.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["token-mean", "seq-mean", "constant"]


def response_weights(response_lengths: Tensor, reduction: Reduction, longest: int) -> Tensor:
    """What the tokens of each response are multiplied with, for the mean over all tokens to be the one that is wanted.

    Args:
        response_lengths: [n] int64, of the global batch: tokens of each response.
        reduction: "token-mean": every token counts alike. "seq-mean": every response does (GRPO's own mean).
            "constant": the sum over tokens / (responses * longest) (Dr. GRPO, arXiv:2503.20783).
        longest: tokens of the longest response there may be.

    Returns:
        [n] fp32.
    """
    lengths = response_lengths.double()
    if reduction == "token-mean":
        return torch.ones_like(lengths).float()
    per_response = lengths.sum() / max(len(lengths), 1)
    if reduction == "seq-mean":
        return (per_response / lengths.clamp(min=1)).float()
    return torch.full_like(lengths, float(per_response) / longest).float()


def token_sum(per_token_loss: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # [n], [n] -> [], [] int32
    """Sum of the per-token loss (0 on masked positions) and the number of unmasked tokens of one micro-batch."""
    return per_token_loss.sum(), mask.bool().sum().int()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:  # [n], [n] -> []
    """Detached mean over unmasked tokens, 0 where there is none. Masked values reach nothing, not even as NaN."""
    mask = mask.bool()
    return values.detach().where(mask, 0.0).sum() / mask.sum().clamp(min=1)
