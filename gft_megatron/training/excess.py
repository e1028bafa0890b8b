"""Token groups from the excess loss, where the data have no scores: SFT-GO's Rho-1 grouping (arXiv:2404.07965).

The score of a token is -log p under the policy plus log p under the reference: what the policy has not learned and the
reference finds learnable. The `eta` share of highest score of each response is important. Both models are asked at the
start of a rollout's steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from gft_megatron.data.token_groups import top_share
from gft_megatron.groups import Batch
from gft_megatron.training.parallel import is_last_stage
from gft_megatron.training.passes import Chunks, sum_over_replicas
from gft_megatron.training.step import Objective, StepInput, forward_log_probs


def with_excess_groups(
    batch: Batch, inputs: Sequence[StepInput], chunks: Chunks, objective: Objective, eta: float
) -> list[StepInput]:
    """The inputs, which have ref_log_probs on the last stage, with token_groups of whole responses on every rank.

    The score of every token of the batch goes to every rank: 8 bytes a token, one all-reduce.
    """
    log_probs = forward_log_probs(chunks, inputs, objective)
    reports = []
    if is_last_stage():
        assert log_probs is not None
        reports = [{"excess": _scores(item, policy, batch)} for item, policy in zip(inputs, log_probs, strict=True)]
    excess = sum_over_replicas(reports)["excess"].cpu()
    groups = torch.full_like(batch.tokens, -1)
    ends = batch.lengths.cumsum(0)
    firsts = ends - batch.lengths + batch.prompt_lengths
    for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
        groups[first:end] = torch.from_numpy(top_share(excess[first:end].numpy(), eta))
    return [_with_groups(item, groups) for item in inputs]


def _scores(item: StepInput, log_probs: Tensor, batch: Batch) -> Tensor:  # [t] -> [tokens of the batch] fp64
    assert item.ref_log_probs is not None
    known = item.micro_batch.mask.to(log_probs.device)
    places = item.micro_batch.label_places.to(log_probs.device)[known]
    scores = torch.zeros(len(batch.tokens), dtype=torch.float64, device=log_probs.device)
    return scores.index_copy_(0, places, (item.ref_log_probs - log_probs).double()[known])


def _with_groups(item: StepInput, groups: Tensor) -> StepInput:
    places = item.micro_batch.label_places
    found = groups[places.clamp(min=0)].where(places >= 0, -1)
    return dataclasses.replace(item, micro_batch=dataclasses.replace(item.micro_batch, token_groups=found))
