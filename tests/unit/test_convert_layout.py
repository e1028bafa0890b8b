"""Layouts against slow, obvious constructions of the Megatron tensor, one head or one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gft_megatron.convert.families import Layout
from gft_megatron.convert.layout import TensorSpec, merge, shard

HEADS, GROUPS, WIDTH, HIDDEN, FFN, VOCAB = 8, 4, 3, 5, 24, 13
TP_SIZES = [1, 2, 4]


def random_parts(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def check(parts: list[Tensor], layout: Layout, expected_shards: list[Tensor], padded_rows: int = 0) -> None:
    """`shard` gives the expected shards and `merge` gives the parts back, bit for bit."""
    spec = TensorSpec(layout, tuple(tuple(part.shape) for part in parts), GROUPS)
    tp_size = len(expected_shards)
    actual = [shard(parts, spec, rank, tp_size, padded_rows) for rank in range(tp_size)]
    for one, expected in zip(actual, expected_shards, strict=True):
        assert torch.equal(one, expected)
    for whole, part in zip(merge(expected_shards, spec), parts, strict=True):
        assert whole.is_contiguous() and torch.equal(whole, part)


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("columns", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_qkv_is_one_run_of_queries_key_value_for_each_group(tp_size: int, columns: tuple[int, ...]) -> None:
    q, k, v = random_parts((HEADS * WIDTH, *columns), (GROUPS * WIDTH, *columns), (GROUPS * WIDTH, *columns))
    shards = []
    for rank in range(tp_size):
        rows = []
        for group in range(rank * GROUPS // tp_size, (rank + 1) * GROUPS // tp_size):
            for head in range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS):
                rows += [q[head * WIDTH + i] for i in range(WIDTH)]
            rows += [k[group * WIDTH + i] for i in range(WIDTH)]
            rows += [v[group * WIDTH + i] for i in range(WIDTH)]
        shards.append(torch.stack(rows))
    check([q, k, v], Layout.QKV, shards)


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_gated_is_own_gate_rows_then_own_up_rows(tp_size: int) -> None:
    gate, up = random_parts((FFN, HIDDEN), (FFN, HIDDEN))
    shards = []
    for rank in range(tp_size):
        own_rows = range(rank * FFN // tp_size, (rank + 1) * FFN // tp_size)
        shards.append(torch.stack([gate[row] for row in own_rows] + [up[row] for row in own_rows]))
    check([gate, up], Layout.GATED, shards)


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_column_and_row_divide_outputs_and_inputs(tp_size: int) -> None:
    (weight,) = random_parts((FFN, 8))
    check([weight], Layout.COLUMN, list(weight.chunk(tp_size, dim=0)))
    check([weight], Layout.ROW, list(weight.chunk(tp_size, dim=1)))
    check([weight], Layout.REPLICATED, [weight] * tp_size)


# 16: padding in the last rank only. 64 over 4 ranks: the last three ranks hold nothing but padding.
@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("padded_rows", [16, 64])
def test_vocabulary_is_padded_with_zero_rows(tp_size: int, padded_rows: int) -> None:
    (weight,) = random_parts((VOCAB, HIDDEN))
    padded = torch.zeros(padded_rows, HIDDEN)
    for row in range(VOCAB):
        padded[row] = weight[row]
    check([weight], Layout.VOCAB, list(padded.chunk(tp_size)), padded_rows)


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        (Layout.QKV, [(HEADS * WIDTH, HIDDEN), (GROUPS * WIDTH, HIDDEN), (GROUPS * WIDTH, HIDDEN)]),
        (Layout.GATED, [(FFN, HIDDEN), (FFN, HIDDEN)]),
        (Layout.ROW, [(HIDDEN, FFN)]),
        (Layout.VOCAB, [(16, HIDDEN)]),
    ],
)
def test_shard_reads_no_more_than_its_own_share(layout: Layout, shapes: list[tuple[int, ...]]) -> None:
    numbers_read = 0

    class Recording:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def __getitem__(self, index: Any) -> Tensor:
            nonlocal numbers_read
            part = self.tensor[index]
            numbers_read += part.numel()
            return part

    parts = random_parts(*shapes)
    shard([Recording(part) for part in parts], TensorSpec(layout, tuple(shapes), GROUPS), 1, 4, 16)
    assert numbers_read == sum(part.numel() for part in parts) // 4
