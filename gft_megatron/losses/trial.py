"""A loss on a handful of numbers, to hear what it says of its hyper-parameters before anything is built."""

from __future__ import annotations

from typing import Any

import torch

from gft_megatron.groups import Source
from gft_megatron.losses.inputs import LossFn, LossInputs


def try_loss(loss: LossFn, hyper: dict[str, Any]) -> None:
    """Call it with every input there is.

    Raises:
        ValueError: a hyper-parameter is out of range.
    """
    tokens = torch.full((4,), -0.5)
    loss(
        LossInputs(
            log_probs=tokens.clone().requires_grad_(),
            mask=torch.ones(4, dtype=torch.bool),
            sequence_ids=torch.tensor([0, 0, 1, 1]),
            group_ids=torch.zeros(2, dtype=torch.int64),
            sources=torch.tensor([int(Source.EXPERT), int(Source.SELF)]),
            entropy=tokens.neg(),
            advantages=torch.tensor([1.0, -1.0]),
            old_log_probs=tokens,
            ref_log_probs=tokens,
            rollout_log_probs=tokens,
            top_entropy=tokens.neg(),
            ref_kl=tokens.neg(),
            token_groups=torch.tensor([0, 1, 0, 1]),
        ),
        **hyper,
    )
