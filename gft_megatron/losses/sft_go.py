"""SFT with Group Optimization (arXiv:2506.15021): cross-entropy and that of the worst group of tokens.

    L = (1 - lam) mean of -log p_t over all tokens + lam max over groups g of the mean of -log p_t over g

    loss_t = -((1 - lam) + lam 1[t in g*] N / N_g*) log p_t,    g* the group with the largest mean

N is the number of tokens, N_g those of group g. Groups are `token_groups`: 1 the important tokens of a response, 0 the
others, or any other partition. Groups without tokens cannot win; ties go to the higher number, the important one.

Written from the abstract and from reviews; no code is known. The form of the objective is the one
that all of them agree with: at lam = 1 it has Rho-1 as a special case. "Groups tokens in each sample" may mean that the
maximum is taken inside each response: per_sample = True. Group DRO, which this is, takes it over a batch: the default,
over the global batch. The paper lets lam decay towards cross-entropy; shape and end are unknown, here linear to 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gft_megatron.losses.inputs import LossInputs, LossOutput, of_token_mean, over_batch, requires, scheduled
from gft_megatron.losses.reduce import masked_mean
from gft_megatron.ops import segment_sums
from gft_megatron.ops.rows import may_look

MAX_GROUPS = 64
"""Groups are numbered below this: batch sums have a fixed length."""


def token_groups(inputs: LossInputs) -> Tensor:  # [n] int64
    """The groups of the tokens, 0 on masked positions.

    Raises:
        ValueError: an unmasked token is in no group; on CUDA, where looking would make the host wait, a device-side
            assertion.
    """
    assert inputs.token_groups is not None
    groups = inputs.token_groups.where(inputs.mask.bool(), 0)
    known = (groups >= 0) & (groups < MAX_GROUPS)
    if not may_look(groups):
        torch._assert_async(known.all(), f"token_groups of response tokens must be in [0, {MAX_GROUPS})")
    elif not known.all():
        raise ValueError(
            f"a response token is in group {int(groups[~known][0])}; groups are in [0, {MAX_GROUPS}). Its data row has "
            "no token_scores: tools/score_tokens.py writes them"
        )
    return groups


def group_sums(inputs: LossInputs) -> tuple[Tensor, Tensor]:  # [num_sequences, MAX_GROUPS] fp64 each
    """Negative log-likelihood and number of tokens of each group in each response, detached."""
    groups = token_groups(inputs)
    cells = inputs.sequence_ids * MAX_GROUPS + groups
    order = cells.argsort(stable=True)
    shape = (len(inputs.sources), MAX_GROUPS)
    nll, counts = segment_sums(
        -inputs.log_probs.detach().float()[order], cells[order], shape[0] * shape[1], mask=inputs.mask[order]
    )
    sums = torch.stack([nll, counts]).double()
    if inputs.context_sum is not None:
        sums = inputs.context_sum(sums)
    return sums[0].view(shape), sums[1].view(shape)


def group_sums_of_batch(inputs: LossInputs) -> dict[str, Tensor]:
    """Negative log-likelihood and number of tokens of each group, [MAX_GROUPS] each."""
    nll, counts = group_sums(inputs)
    return {"group_nll": nll.sum(0), "group_tokens": counts.sum(0)}


def worst_group(nll: Tensor, counts: Tensor) -> Tensor:  # [..., MAX_GROUPS] -> [...] int64
    """The group with the largest mean; of several the one with the highest number. 0 where there is no token."""
    means = (nll / counts.clamp(min=1)).masked_fill(counts == 0, -math.inf)
    winner = MAX_GROUPS - 1 - means.flip(-1).argmax(-1)  # argmax takes the first of several
    return winner.where((counts > 0).any(-1), 0)


@of_token_mean
@scheduled(lam="0.9:0:linear")
@requires("token_groups")
@over_batch(group_sums_of_batch)
def sft_go(inputs: LossInputs, *, lam: float = 0.9, per_sample: bool = False) -> LossOutput:
    """SFT-GO's per-token loss [n], 0 on masked positions. Every response counts, whatever its reward.

    Args:
        lam: weight of the worst group; 0 is cross-entropy.
        per_sample: each response has a worst group of its own, and at lam = 1 the loss is the mean over responses,
            weighted by their tokens, of the means over these groups.

    Raises:
        ValueError: lam is out of range, or a response token is in no group.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is {lam}; it has to be between 0 and 1 (0 is cross-entropy)")
    assert inputs.batch is not None
    groups = token_groups(inputs)
    batch_nll, batch_counts = inputs.batch["group_nll"], inputs.batch["group_tokens"]
    if per_sample:
        nll, counts = group_sums(inputs)
    else:
        # One line for all responses.
        nll, counts = (sums.expand(len(inputs.sources), -1) for sums in (batch_nll, batch_counts))
    worst = worst_group(nll, counts)  # [num_sequences]
    size = counts.gather(1, worst[:, None])[:, 0]
    boost = (counts.sum(1) / size.clamp(min=1)).float()

    mask = inputs.mask.bool()
    in_worst = groups == worst[inputs.sequence_ids]
    coefficient = (1.0 - lam) + lam * boost[inputs.sequence_ids].where(in_worst, 0.0)
    loss = -coefficient * inputs.log_probs.where(mask, 0.0)
    group_means = (batch_nll / batch_counts.clamp(min=1)).float()
    metrics = {
        "coefficient_mean": masked_mean(coefficient, mask),
        "worst_group_frac": masked_mean(in_worst.float(), mask),
        "important_wins_frac": masked_mean((worst == 1).float()[inputs.sequence_ids], mask),
        "group_0_nll": masked_mean(group_means[0].expand_as(loss), mask),
        "group_1_nll": masked_mean(group_means[1].expand_as(loss), mask),
    }
    return loss.where(mask, 0.0), metrics
