"""Logits of the Megatron model for whole sequences, under any tensor- and pipeline-parallel layout.

Legend: b sequences, s tokens of each, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn


def logits_of(chunks: Sequence[nn.Module], tokens: Tensor) -> Tensor | None:  # [b, s] int64 -> [b, s, v]
    """One forward pass through all stages; None but on the last. Collective over the ranks of a replica."""
    tokens = tokens.to(torch.cuda.current_device())

    def forward_step(_: object, model: nn.Module) -> tuple:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return model(tokens, positions, None), whole

    def whole(logits: Tensor, non_loss_data: bool) -> Tensor:
        return gather_from_tensor_model_parallel_region(logits)

    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return collected[0] if collected else None
