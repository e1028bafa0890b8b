"""From a flat batch to packed micro-batches of the THD layout: pure functions, the same on every rank.

Samples are put one after the other without attending to each other (`cu_seqlens`), each padded to a multiple that
context parallelism needs, and the rest of the micro-batch is one dummy sequence that nothing is learned from.

Legend: T tokens of a micro-batch on one context-parallel rank, S its samples (one placeholder if it has none).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gft_megatron.groups import Batch, Source
from gft_megatron.ops import balanced_partition

IGNORED_LABEL = -100


@dataclass(frozen=True)
class PackedMicroBatch:
    """One forward pass. Position i predicts labels[i]; mask, log-probs, groups and sequence ids are of that label."""

    tokens: Tensor  # [T] int64
    labels: Tensor  # [T] int64, the sequence's next token; -100 where nothing is learned
    mask: Tensor  # [T] bool, labels != -100
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    sequence_ids: Tensor  # [T] int64, index into the [S] fields; 0 at padding
    rollout_log_probs: Tensor  # [T] float32, NaN where the sampler gave none
    token_groups: Tensor  # [T] int64, -1 where unknown
    cu_seqlens: Tensor  # [sequences + 1] int32, over all context-parallel ranks, the dummy sequence included
    max_seqlen: int
    length: int  # T * cp_size
    group_ids: Tensor  # [S] int64
    sources: Tensor  # [S] int64
    advantages: Tensor  # [S] float32
    rewards: Tensor  # [S] float32
    weights: Tensor  # [S] float32, what the losses of a sample's tokens are multiplied with
    label_places: Tensor  # [T] int64, index of the label among the tokens of the batch that was planned; -1 without one
    sample_ids: Tensor  # [S] int64, index of the sample in the batch that was planned
    response_lengths: Tensor  # [samples of that batch] int64


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    num_replicas: int,
    max_tokens: int,
    max_sequences: int | None = None,
    multiple_of: int = 1,
) -> list[list[list[int]]]:
    """Divide samples over data-parallel replicas and micro-batches.

    As few micro-batches as the limits allow, of equal size as far as possible. The i-th micro-batches of all replicas
    are of similar size, because expert parallelism makes replicas wait for each other in every layer.

    Args:
        lengths: tokens of each sample, prompt and response.
        max_tokens: most tokens of a micro-batch, before padding.
        max_sequences: most samples of a micro-batch.
        multiple_of: micro-batches of a replica are a multiple of this (the interleaved pipeline schedule).

    Returns:
        plan[replica][micro_batch] -> indices into lengths; as many micro-batches on each replica, some maybe empty.

    Raises:
        ValueError: one sample is longer than max_tokens.
    """
    if max(lengths, default=0) > max_tokens:
        raise ValueError(f"a sample has {max(lengths)} tokens, more than --max-tokens-per-gpu {max_tokens}")
    step = num_replicas * multiple_of

    def partition(num_steps: int) -> list[list[int]]:
        return balanced_partition(list(lengths), num_steps * step, max_sequences)

    def fits(num_steps: int) -> bool:
        return all(sum(lengths[i] for i in members) <= max_tokens for members in partition(num_steps))

    num_needed = max(math.ceil(sum(lengths) / max_tokens), math.ceil(len(lengths) / (max_sequences or max_tokens)))
    least = max(math.ceil(num_needed / step), 1)
    most = max(math.ceil(len(lengths) / step), least)  # each sample in a micro-batch of its own
    bins = partition(least + bisect.bisect_left(range(least, most), True, key=fits))
    # Neighbours of equal length share one attention call (training/spec.py).
    bins = [sorted(members, key=lambda i: (lengths[i], i)) for members in bins]
    bins.sort(key=lambda members: sum(lengths[i] for i in members), reverse=True)
    rows = [bins[start : start + num_replicas] for start in range(0, len(bins), num_replicas)]
    # Back and forth, so that the first replica does not get the largest of every row.
    rows[1::2] = [row[::-1] for row in rows[1::2]]
    return [[row[replica] for row in rows] for replica in range(num_replicas)]


def packed_length(lengths: Sequence[int], *, sequence_multiple: int = 1, length_multiple: int = 1) -> int:
    """Least length of a micro-batch of these samples, each padded, rounded up to a positive multiple of both."""
    total = sum(_round_up(length, sequence_multiple) for length in lengths)
    return _round_up(max(total, 1), math.lcm(sequence_multiple, length_multiple))


def pack_micro_batch(
    batch: Batch,
    indices: Sequence[int],
    *,
    length: int,
    weights: Tensor | None = None,
    sequence_multiple: int = 1,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> PackedMicroBatch:
    """Pack the samples at `indices` into `length` tokens and take the part of one context-parallel rank.

    Args:
        length: over all context-parallel ranks; a multiple of sequence_multiple, at least `packed_length`.
        weights: [samples of the batch], see `losses.reduce.response_weights`; None: 1.
        sequence_multiple: each sample is padded to a multiple of this; a multiple of 2 * cp_size if cp_size > 1.
    """
    assert cp_size == 1 or sequence_multiple % (2 * cp_size) == 0, (sequence_multiple, cp_size)
    assert length % sequence_multiple == 0, (length, sequence_multiple)
    samples = batch.select(indices)
    ends = samples.lengths.cumsum(0).tolist()
    padded = [_round_up(n, sequence_multiple) for n in samples.lengths.tolist()]
    used = sum(padded)
    assert used <= length, (used, length)
    sizes = padded + ([length - used] if used < length else [])

    tokens = torch.zeros(length, dtype=torch.int64)
    labels = torch.full((length,), IGNORED_LABEL, dtype=torch.int64)
    log_probs = torch.full((length,), math.nan, dtype=torch.float32)
    token_groups = torch.full((length,), -1, dtype=torch.int64)
    sequence_ids = torch.zeros(length, dtype=torch.int64)
    places = torch.full((length,), -1, dtype=torch.int64)
    batch_ends = batch.lengths.cumsum(0)[list(indices)].tolist()
    start = 0
    for i, (end, num_tokens, num_prompt) in enumerate(
        zip(ends, samples.lengths.tolist(), samples.prompt_lengths.tolist(), strict=True)
    ):
        sample = slice(end - num_tokens, end)
        tokens[start : start + num_tokens] = samples.tokens[sample]
        # The last prompt token predicts the first response token; the last token of all predicts nothing.
        first, last = start + num_prompt - 1, start + num_tokens - 1
        labels[first:last] = samples.tokens[sample][num_prompt:]
        log_probs[first:last] = samples.rollout_log_probs[sample][num_prompt:]
        token_groups[first:last] = samples.token_groups[sample][num_prompt:]
        sequence_ids[start : start + num_tokens] = i
        places[first:last] = torch.arange(batch_ends[i] - (num_tokens - num_prompt), batch_ends[i])
        start += padded[i]

    here = _positions_of_rank(sizes, cp_size, cp_rank)
    labels = labels[here]
    columns = samples if len(indices) else _PLACEHOLDER
    return PackedMicroBatch(
        tokens=tokens[here],
        labels=labels,
        mask=labels != IGNORED_LABEL,
        position_ids=torch.cat([torch.arange(size) for size in sizes])[here],
        sequence_ids=sequence_ids[here],
        rollout_log_probs=log_probs[here],
        token_groups=token_groups[here],
        cu_seqlens=torch.tensor([0, *sizes]).cumsum(0).to(torch.int32),
        max_seqlen=max(sizes),
        length=length,
        group_ids=columns.group_ids,
        sources=columns.sources,
        advantages=columns.advantages,
        rewards=columns.rewards,
        weights=torch.ones(len(columns.sources)) if weights is None or not len(indices) else weights[list(indices)],
        label_places=places[here],
        sample_ids=torch.tensor(list(indices) or [0]),
        response_lengths=batch.lengths - batch.prompt_lengths,
    )


def _positions_of_rank(sizes: Sequence[int], cp_size: int, cp_rank: int) -> Tensor:  # [T] int64
    """Each sequence cut into 2 * cp_size chunks, of which rank r holds chunks r and 2 * cp_size - 1 - r.

    So every rank has as much causal attention to compute. The layout of Transformer Engine's
    thd_get_partitioned_indices and of Megatron's rope_utils._get_thd_freqs_on_this_cp_rank.
    """
    if cp_size == 1:
        return torch.arange(sum(sizes))
    parts, start = [], 0
    for size in sizes:
        chunks = torch.arange(start, start + size).chunk(2 * cp_size)
        parts += [chunks[cp_rank], chunks[-1 - cp_rank]]
        start += size
    return torch.cat(parts)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# What the tokens of a micro-batch without samples point to. None of them is learned from.
_PLACEHOLDER = Batch(
    tokens=torch.zeros(0, dtype=torch.int64),
    rollout_log_probs=torch.zeros(0),
    token_groups=torch.zeros(0, dtype=torch.int64),
    lengths=torch.zeros(1, dtype=torch.int64),
    prompt_lengths=torch.zeros(1, dtype=torch.int64),
    group_ids=torch.full((1,), -1),
    sources=torch.full((1,), int(Source.EXPERT)),
    rewards=torch.full((1,), math.nan),
    advantages=torch.zeros(1),
    truncated=torch.zeros(1, dtype=torch.bool),
    weight_versions=torch.full((1,), -1),
    rows=torch.full((1,), -1),
    responses=torch.full((1,), -1),
)
