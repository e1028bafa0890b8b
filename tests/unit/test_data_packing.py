"""Packed tensors against a loop over tokens; the split over context-parallel ranks against Megatron's rotary code."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gft_megatron.data.packing import PackedMicroBatch, pack_micro_batch, packed_length, plan_micro_batches
from gft_megatron.groups import Batch, Group, Prompt, Sample, Source

SIZES = [(3, 2), (1, 1), (5, 4), (2, 7), (4, 1)]  # prompt and response tokens; one of each the shortest possible


def make_batch(sizes: list[tuple[int, int]] = SIZES) -> Batch:
    """Tokens 1, 2, 3, ...; every second sample is the model's own and has log-probs -0.1 * token, others groups."""
    groups, counter = [], itertools.count(1)
    for i, (num_prompt, num_response) in enumerate(sizes):
        prompt = Prompt(i, np.array([next(counter) for _ in range(num_prompt)], np.int64), "")
        ids = np.array([next(counter) for _ in range(num_response)], np.int64)
        own = i % 2 == 1
        sample = Sample(
            source=Source.SELF if own else Source.TEACHER,
            token_ids=ids,
            text="",
            reward=float(i),
            rollout_log_probs=(-0.1 * ids).astype(np.float32) if own else None,
            token_groups=None if own else 100 + ids,
        )
        groups.append(Group(prompt, (sample,)))
    batch = Batch.from_groups(groups, [10 + i for i in range(len(sizes))])
    return dataclasses.replace(batch, advantages=0.5 * torch.arange(len(sizes)))


def expected_columns(indices: list[int], length: int, multiple: int) -> dict[str, list]:
    """token, label, position, sequence, log-prob and group of every place, one at a time."""
    names = ("tokens", "labels", "position_ids", "sequence_ids", "rollout_log_probs", "token_groups")
    columns = {name: [] for name in names}

    def place(*values: float) -> None:
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)

    first_token = [1 + sum(map(sum, SIZES[:i])) for i in range(len(SIZES))]
    for sequence, i in enumerate(indices):
        num_prompt, num_response = SIZES[i]
        num_tokens = num_prompt + num_response
        for j in range(num_tokens):
            token, learned = first_token[i] + j, num_prompt - 1 <= j < num_tokens - 1
            own = learned and i % 2 == 1
            log_prob, group = -0.1 * (token + 1) if own else np.nan, 101 + token if learned and not own else -1
            place(token, token + 1 if learned else -100, j, sequence, log_prob, group)
        for j in range(num_tokens, -(-num_tokens // multiple) * multiple):
            place(0, -100, j, 0, np.nan, -1)
    for j in range(length - len(columns["tokens"])):
        place(0, -100, j, 0, np.nan, -1)
    return columns


def check(packed: PackedMicroBatch, expected: dict[str, list], places: list[int]) -> None:
    for name, column in expected.items():
        actual = getattr(packed, name).double().numpy()
        np.testing.assert_allclose(actual, np.array(column, float)[places], rtol=1e-6, err_msg=name)
    assert torch.equal(packed.mask, packed.labels != -100)
    # The batch's tokens are 1, 2, 3, ...
    assert torch.equal(packed.label_places, (packed.labels - 1).where(packed.mask, -1))


@pytest.mark.parametrize("indices", [[0], [1], [4, 1, 2], [3, 0, 1, 2, 4]])
@pytest.mark.parametrize("multiple, slack", [(1, 0), (1, 5), (4, 0), (4, 8)])
def test_packed_tensors_equal_a_loop_over_tokens(indices: list[int], multiple: int, slack: int) -> None:
    batch = make_batch()
    length = packed_length(batch.lengths[indices].tolist(), sequence_multiple=multiple) + slack
    packed = pack_micro_batch(batch, indices, length=length, sequence_multiple=multiple)
    check(packed, expected_columns(indices, length, multiple), list(range(length)))
    sizes = [-(-sum(SIZES[i]) // multiple) * multiple for i in indices] + [slack] * (slack > 0)
    assert packed.cu_seqlens.tolist() == [0, *itertools.accumulate(sizes)] and packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == max(sizes) and packed.length == length
    assert packed.group_ids.tolist() == [10 + i for i in indices]
    assert packed.advantages.tolist() == [0.5 * i for i in indices] and packed.rewards.tolist() == indices
    assert packed.sources.tolist() == [2 if i % 2 else 1 for i in indices]


@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("indices", [[0], [4, 1, 2], []])
def test_context_parallel_ranks_hold_mirrored_chunks(cp_size: int, indices: list[int]) -> None:
    rope_utils = pytest.importorskip("megatron.core.models.common.embeddings.rope_utils")
    batch, multiple = make_batch(), 2 * cp_size
    length = packed_length(batch.lengths[indices].tolist(), sequence_multiple=multiple) + multiple
    expected = expected_columns(indices, length, multiple)
    seen = []
    for rank in range(cp_size):
        packed = pack_micro_batch(
            batch, indices, length=length, sequence_multiple=multiple, cp_size=cp_size, cp_rank=rank
        )
        places, positions = [], []
        for start, end in itertools.pairwise(packed.cu_seqlens.tolist()):
            chunk = (end - start) // multiple
            front, back = start + rank * chunk, end - (rank + 1) * chunk
            places += [*range(front, front + chunk), *range(back, back + chunk)]
            # Megatron looks the rotary frequency of every token up by this function.
            held = torch.empty(2 * chunk)
            positions.append(rope_utils._get_thd_freqs_on_this_cp_rank(rank, cp_size, held, torch.arange(length)))
        check(packed, expected, places)
        assert torch.equal(packed.position_ids, torch.cat(positions))
        assert packed.cu_seqlens[-1] == length == packed.length == cp_size * len(packed.tokens)
        seen += places
    assert sorted(seen) == list(range(length))


def test_micro_batch_without_samples_teaches_nothing() -> None:
    packed = pack_micro_batch(make_batch(), [], length=6)
    assert packed.tokens.tolist() == [0] * 6 and not packed.mask.any() and packed.labels.tolist() == [-100] * 6
    assert packed.cu_seqlens.tolist() == [0, 6] and packed.max_seqlen == 6
    # Something to look up by sequence_ids, which are all 0.
    assert packed.advantages[packed.sequence_ids].tolist() == [0.0] * 6 and packed.group_ids.tolist() == [-1]


def test_packed_length() -> None:
    assert packed_length([5, 3, 8]) == 16
    assert packed_length([5, 3, 8], sequence_multiple=4) == 8 + 4 + 8
    assert packed_length([5, 3, 8], sequence_multiple=4, length_multiple=24) == 24
    assert packed_length([5], sequence_multiple=4, length_multiple=6) == 12
    assert packed_length([], sequence_multiple=4) == 4


@given(
    lengths=st.lists(st.integers(1, 100), max_size=40),
    num_replicas=st.integers(1, 4),
    max_tokens=st.integers(100, 400),
    max_sequences=st.none() | st.integers(1, 5),
    multiple_of=st.integers(1, 3),
)
def test_plan_keeps_to_every_limit(
    lengths: list[int], num_replicas: int, max_tokens: int, max_sequences: int | None, multiple_of: int
) -> None:
    limits = dict(max_tokens=max_tokens, max_sequences=max_sequences, multiple_of=multiple_of)
    plan = plan_micro_batches(lengths, num_replicas=num_replicas, **limits)
    assert len(plan) == num_replicas
    [num_micro_batches] = {len(micro_batches) for micro_batches in plan}
    assert num_micro_batches >= 1 and num_micro_batches % multiple_of == 0
    members = [members for micro_batches in plan for members in micro_batches]
    assert sorted(itertools.chain.from_iterable(members)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in m) <= max_tokens for m in members)
    assert max_sequences is None or all(len(m) <= max_sequences for m in members)
    # Longest-first packing into bins that are two thirds full at worst needs no more than this.
    needed = max(sum(lengths) / max_tokens * 2 + 1, len(lengths) / max_sequences if max_sequences else 0)
    assert num_micro_batches <= -(-needed // (num_replicas * multiple_of)) * multiple_of


def test_plan_balances_replicas_and_rows_of_micro_batches() -> None:
    lengths = np.random.default_rng(0).integers(50, 1000, 512).tolist()
    plan = plan_micro_batches(lengths, num_replicas=8, max_tokens=8192)
    tokens = np.array([[sum(lengths[i] for i in m) for m in micro_batches] for micro_batches in plan])
    assert tokens.shape == (8, 5)  # 262,000 tokens need 32 micro-batches if they were full, 40 in rows of 8
    assert np.ptp(tokens.sum(1)) <= 0.01 * tokens.sum(1).mean()
    assert (np.ptp(tokens, axis=0) <= 0.01 * tokens.mean()).all()


def test_no_replica_gets_the_largest_of_every_row() -> None:
    plan = plan_micro_batches([8, 7, 6, 5, 4, 3, 2, 1], num_replicas=2, max_tokens=8, max_sequences=1)
    assert plan == [[[0], [3], [4], [7]], [[1], [2], [5], [6]]]  # 8 + 5 + 4 + 1 = 7 + 6 + 3 + 2


def test_sample_longer_than_a_micro_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample has 9 tokens, more than --max-tokens-per-gpu 8"):
        plan_micro_batches([3, 9], num_replicas=1, max_tokens=8)
