"""What the operators write is the result in fp32, rounded once to the logits' dtype, as torch rounds."""

import contextlib

import pytest
import torch
from torch import Tensor

import gft_megatron.ops  # noqa: F401 -- registers the operators

OPS = torch.ops.gft_megatron
WIDTH = 130  # whole vectors and a tail


def awkward_values(dtype: torch.dtype) -> Tensor:
    """fp32 numbers around what `dtype` can hold: ties between neighbours, a little to both sides, the ends, NaN."""
    info = torch.finfo(dtype)
    exact = torch.cat([torch.linspace(-300, 300, 1201), torch.tensor([info.max, info.smallest_normal, 1.0])]).to(dtype)
    up = torch.nextafter(exact, torch.tensor(float("inf"), dtype=dtype))
    ties = (exact.double() + up.double()).div(2).float()
    ties = ties[ties.isfinite()]
    towards = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (float("-inf"), float("inf"))]
    # The processor's conversion to bfloat16 takes fp32 subnormals, 1e-38 of anything that matters, for 0.
    normal = torch.cat([ties, *towards])
    normal = normal[normal.abs() >= torch.finfo(torch.float32).smallest_normal]
    nan_bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    return torch.cat([normal, nan_bits, torch.tensor([float("inf"), float("-inf"), info.max, -info.max])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_is_rounded_once(dtype: torch.dtype) -> None:
    # Logits, maximum and log-sum of 0: the probability is exactly 1, and the gradient -dL/dlogp wherever the label of
    # the row is in another shard.
    upstream = awkward_values(dtype)
    n = len(upstream)
    zeros = torch.zeros(n)
    grad = torch.empty(n, WIDTH, dtype=dtype)
    labels = torch.full((n,), 5)
    OPS.row_grad_(
        torch.zeros(n, WIDTH, dtype=dtype), grad, labels, 1000, WIDTH, 1.0, zeros, zeros, zeros, upstream, None
    )
    expected = (-upstream).to(dtype)[:, None].expand(n, WIDTH)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)


def test_operators_check_their_arguments() -> None:
    logits, labels = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    for inv_temperature in (0.0, -1.0, 1e-46, 1e39, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="inv_temperature must be positive and finite"):
            OPS.row_stats(logits, labels, 0, 8, inv_temperature, False)
    with pytest.raises(ValueError, match="vocab_start must not be negative, got -1"):
        OPS.row_stats(logits, labels, -1, 8, 1.0, False)
    with pytest.raises(ValueError, match=r"valid_vocab must be in \[0, 8\], got 9"):
        OPS.row_stats(logits, labels, 0, 9, 1.0, False)
    with pytest.raises(ValueError, match="labels must be"):
        OPS.row_stats(logits, labels.int(), 0, 8, 1.0, False)
    with pytest.raises(ValueError, match="values must be"):
        OPS.segment_sums(torch.zeros(2, dtype=torch.float64), None, labels, 1)
    with pytest.raises(ValueError, match="mask must be"):
        OPS.segment_sums(torch.zeros(2), torch.ones(3, dtype=torch.bool), labels, 1)
    with pytest.raises(ValueError, match="rewards must be"):
        OPS.group_advantages(torch.zeros(2), labels, True, 1, 1e-6)


def test_a_gradient_that_overlaps_its_logits_is_refused() -> None:
    memory = torch.zeros(3, 8)
    labels, row = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    with pytest.raises(ValueError, match="overlap"):
        OPS.row_grad_(memory[:2], memory[1:], labels, 0, 8, 1.0, row, row, row, row, None)
    with pytest.raises(ValueError, match="starts where logits does with other strides"):
        OPS.row_grad_(memory[:2, :4], memory.view(-1)[:8].view(2, 4), labels, 0, 4, 1.0, row, row, row, row, None)


@pytest.mark.parametrize("place, is_fine", [(111, False), (112, True), (113, False), (124, False), (88, True)])
def test_rows_with_room_between_may_interleave_but_not_overlap(place: int, is_fine: bool) -> None:
    memory, zeros = torch.zeros(400), torch.zeros(3)
    logits, grad = (torch.as_strided(memory, (3, 12), (24, 1), offset) for offset in (100, place))
    with contextlib.nullcontext() if is_fine else pytest.raises(ValueError, match="overlap"):
        OPS.row_grad_(logits, grad, zeros.long(), 0, 12, 1.0, zeros, zeros, zeros, zeros, None)


def test_no_rows_have_no_overlap() -> None:
    logits, wide = torch.zeros(0, 8), torch.zeros(0, 16)[:, :8]
    none = torch.zeros(0)
    OPS.row_grad_(logits, wide, none.long(), 0, 8, 1.0, none, none, none, none, None)
