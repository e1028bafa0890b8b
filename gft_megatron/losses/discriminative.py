"""Discriminative Finetuning (arXiv:2502.18679; formulas as in the authors' code). Not Dynamic Fine-Tuning, dft.py.

    L = -log p(y) + sum over j of sg(w_j) log p(y'_j),    w_j = exp(s_j) / sum over k of exp(s_k)

y is an expert's response, y'_j are the other responses of its group: what the model finds likely beside the
demonstration is made less likely, whatever its reward. Two scores:

    discriminative         s_j = log p(y'_j) - log p_ref(y'_j), sums over tokens            the authors' DFT
    discriminative_mean    s_j = mean over t of log p_t / 0.3, and means in L, no reference  the authors' DFT2

The authors divide exp(s_j) by a running mean over the visits of a prompt, with mixing rates of 0.85 and 0.9; here the
mean is that of the group at hand (a rate of 1). They draw the negatives from the reference model with a system prompt
that asks for unhelpful answers. They average over demonstrations; `discriminative` here divides by tokens.

A group may lie on several micro-batches and replicas, so its sum is one of the batch sums, whose temperatures 1 and 0.3
are therefore no parameters. The sums of the step before are those of other prompts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gft_megatron.groups import Source
from gft_megatron.losses.inputs import LossInputs, LossOutput, of_token_mean, over_batch, requires, trains_on
from gft_megatron.losses.reduce import masked_mean
from gft_megatron.losses.sequences import sequence_means, sequence_sums
from gft_megatron.ops.rows import may_look

MAX_GROUPS = 65536
"""Groups of a batch are numbered below this: batch sums have a fixed length."""
_MEAN_TEMPERATURE = 0.3  # of the paper
_LIMIT = 600.0  # of a score: thousands of exp(600) still have a sum in float64, and exp(-600) is not 0

_Scores = Callable[[LossInputs], Tensor]


def _ratio_scores(inputs: LossInputs) -> Tensor:  # [num_sequences] fp64
    assert inputs.ref_log_probs is not None
    return sequence_sums(inputs, inputs.log_probs - inputs.ref_log_probs)[0].double()


def _mean_scores(inputs: LossInputs) -> Tensor:  # [num_sequences] fp64
    return sequence_means(inputs, inputs.log_probs).double() / _MEAN_TEMPERATURE


def _members(inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:  # [num_sequences] bool, bool, int64
    """Which responses are demonstrations and which negatives, and their groups; one without tokens is neither.

    Raises:
        ValueError: a group's number is out of range; on CUDA a device-side assertion.
    """
    present = sequence_sums(inputs, inputs.log_probs)[1] > 0
    groups = inputs.group_ids.where(present, 0)
    known = (groups >= 0) & (groups < MAX_GROUPS)
    if not may_look(groups):
        torch._assert_async(known.all(), f"group_ids must be in [0, {MAX_GROUPS})")
    elif not known.all():
        raise ValueError(f"group_ids has {int(groups[~known][0])}; groups are numbered in [0, {MAX_GROUPS})")
    positive = present & (inputs.sources == int(Source.EXPERT))
    return positive, present & ~positive, groups


def _sums(scores: _Scores) -> Callable[[LossInputs], dict[str, Tensor]]:
    def sums(inputs: LossInputs) -> dict[str, Tensor]:
        positive, negative, groups = _members(inputs)
        table = torch.zeros(MAX_GROUPS, dtype=torch.float64, device=groups.device)
        each = scores(inputs).clamp(-_LIMIT, _LIMIT).exp() * negative
        return {
            "positives": table.index_add(0, groups, positive.double()),
            "negatives": table.index_add(0, groups, each),
            "tokens": sequence_sums(inputs, inputs.log_probs)[1].double().sum(),
        }

    return sums


@trains_on("mixed")
@requires("ref_log_probs")
@over_batch(_sums(_ratio_scores), of_this_batch=True)
def discriminative(inputs: LossInputs) -> LossOutput:
    """Discriminative Finetuning's per-token loss [n], 0 on masked positions and in groups without a demonstration.

    Raises:
        ValueError: a group's number is out of range, or the tokens of a response are not adjacent.
    """
    return _loss(inputs, _weights(inputs, _ratio_scores))


@of_token_mean
@trains_on("mixed")
@over_batch(_sums(_mean_scores), of_this_batch=True)
def discriminative_mean(inputs: LossInputs) -> LossOutput:
    """As `discriminative`, with means over tokens in scores and loss, and without a reference."""
    assert inputs.batch is not None
    _, counts = sequence_sums(inputs, inputs.log_probs)
    num_positives = inputs.batch["positives"].sum().clamp(min=1)
    share = inputs.batch["tokens"] / (num_positives * counts.clamp(min=1))
    return _loss(inputs, _weights(inputs, _mean_scores) * share)


def _weights(inputs: LossInputs, scores: _Scores) -> Tensor:  # [num_sequences] fp64
    """1 for demonstrations; for negatives -w_j, for each demonstration of the group."""
    assert inputs.batch is not None
    positive, negative, groups = _members(inputs)
    share = scores(inputs).clamp(-_LIMIT, _LIMIT).exp() / inputs.batch["negatives"][groups]
    return torch.where(negative, -share * inputs.batch["positives"][groups], positive.double())


def _loss(inputs: LossInputs, weights: Tensor) -> LossOutput:
    mask = inputs.mask.bool()
    coefficient = weights.float()[inputs.sequence_ids]
    metrics = {
        "coefficient_mean": masked_mean(coefficient, mask),
        "negative_weight_mean": masked_mean((-coefficient).clamp(min=0), mask),
    }
    return -(coefficient * inputs.log_probs.where(mask, 0.0)).where(mask, 0.0), metrics
