"""The batch that every layout trains on."""

import torch

from gft_megatron.groups import Batch


def ragged_groups() -> Batch:
    """6 groups of 4 responses, prompts of 2-9 tokens, responses of 1-30."""
    generator = torch.Generator().manual_seed(11)
    num_samples = 24
    prompt_lengths = torch.randint(2, 10, (6,), generator=generator).repeat_interleave(4)
    lengths = prompt_lengths + torch.randint(1, 31, (num_samples,), generator=generator)
    total = int(lengths.sum())
    tokens = torch.randint(0, 131, (total,), generator=generator)
    return Batch(
        tokens=tokens,
        rollout_log_probs=torch.full((total,), float("nan")),
        token_groups=tokens % 2,
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        group_ids=torch.arange(6).repeat_interleave(4),
        sources=torch.tensor([0, 1, 2, 2]).repeat(6),
        rewards=torch.rand(num_samples, generator=generator),
        advantages=torch.randn(num_samples, generator=generator),
        truncated=torch.zeros(num_samples, dtype=torch.bool),
        weight_versions=torch.zeros(num_samples, dtype=torch.int64),
        rows=torch.arange(6).repeat_interleave(4),
        responses=torch.tensor([0, 1, -1, -1]).repeat(6),
    )
