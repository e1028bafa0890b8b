"""segment_sums and segment_means against numpy in float64, segment by segment."""

import numpy as np
import pytest
import torch
from torch import Tensor

from gft_megatron.ops import segment_means, segment_sums

NAN = float("nan")


def make_case(num_segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values of very different size, ids with empty segments at both ends and inside, a mask."""
    generator = torch.Generator().manual_seed(num_segments)
    ids = torch.randint(1, max(num_segments - 1, 2), (5 * num_segments,), generator=generator).sort()[0]
    ids[ids == 3] = 4
    values = torch.randn(len(ids), generator=generator) * 10.0 ** torch.randint(-3, 4, (len(ids),), generator=generator)
    return values, ids.clamp(max=max(num_segments - 1, 0)), torch.rand(len(ids), generator=generator) < 0.7


def expected_sums(values: Tensor, ids: Tensor, num_segments: int, mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
    parts = [values[(ids == i) & mask.bool()].double().numpy() for i in range(num_segments)]
    return np.array([part.sum() for part in parts]), np.array([len(part) for part in parts])


@pytest.mark.parametrize("masked", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("num_segments", [1, 8, 300])
def test_matches_numpy(num_segments: int, masked: torch.dtype | None) -> None:
    values, ids, mask = make_case(num_segments)
    if masked is None:
        mask = torch.ones_like(mask)
    sums, counts = expected_sums(values, ids, num_segments, mask)
    values[~mask] = NAN  # reaches nothing
    upstream = torch.randn(num_segments, generator=torch.Generator().manual_seed(1))
    argument = None if masked is None else mask.to(masked)

    leaf = values.requires_grad_()
    actual, how_many = segment_sums(leaf, ids, num_segments, mask=argument)
    np.testing.assert_allclose(actual.detach().numpy(), sums, rtol=1e-6, atol=1e-6)
    assert how_many.tolist() == counts.tolist() and not how_many.requires_grad
    actual.backward(upstream)
    assert torch.equal(leaf.grad, torch.where(mask, upstream[ids], 0.0))

    leaf.grad = None
    means = segment_means(leaf, ids, num_segments, mask=argument)
    np.testing.assert_allclose(means.detach().numpy(), sums / np.maximum(counts, 1), rtol=1e-6, atol=1e-6)
    means.backward(upstream)
    share = (upstream.double() / torch.from_numpy(counts).clamp(min=1))[ids]
    torch.testing.assert_close(leaf.grad.double(), torch.where(mask, share, 0.0), rtol=1e-6, atol=1e-9)


def test_sum_is_taken_in_float64() -> None:
    sums, _ = segment_sums(torch.tensor([1e8, 1.0, -1e8, 2.0]), torch.tensor([0, 0, 0, 1]), 2)
    assert sums.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("num_segments", [0, 3])
def test_no_values(num_segments: int) -> None:
    values = torch.zeros(0, requires_grad=True)
    sums, counts = segment_sums(values, torch.zeros(0, dtype=torch.int64), num_segments)
    sums.sum().backward()
    assert sums.tolist() == counts.tolist() == [0.0] * num_segments and values.grad.shape == (0,)


def test_gradient_of_the_gradient() -> None:
    ids = torch.tensor([0, 0, 2])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = segment_sums(values, ids, 3)[0].square().sum()
    (grad,) = torch.autograd.grad(loss, values, create_graph=True)
    (second,) = torch.autograd.grad(grad[0], values)
    assert grad.tolist() == [6.0, 6.0, 6.0] and second.tolist() == [2.0, 2.0, 0.0]


@pytest.mark.parametrize("masked", [False, True])
def test_reference_mode_agrees(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    values, ids, mask = make_case(40)
    results = []
    for mode in ("0", "1"):
        monkeypatch.setenv("GFT_MEGATRON_REFERENCE", mode)
        leaf = values.clone().requires_grad_()
        sums, counts = segment_sums(leaf, ids, 40, mask=mask if masked else None)
        (sums * torch.arange(40)).sum().backward()
        results.append((sums.detach(), counts, leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"segment_ids": torch.tensor([0, 2, 1])}, "segment ids must not decrease, got 1 after 2"),
        ({"segment_ids": torch.tensor([0, 1, 3])}, r"segment id 3 is outside \[0, 3\)"),
        ({"segment_ids": torch.tensor([-1, 1, 2])}, r"segment id -1 is outside \[0, 3\)"),
        ({"segment_ids": torch.tensor([0, 1])}, r"segment_ids must be int64 \(3,\) on cpu"),
        ({"segment_ids": torch.tensor([0, 1, 2], dtype=torch.int32)}, r"segment_ids must be int64 \(3,\) on cpu"),
        ({"values": torch.zeros(3, 1)}, r"values must be \[n\] float32, got \(3, 1\)"),
        ({"values": torch.zeros(3, dtype=torch.bfloat16)}, r"values must be \[n\] float32, got .* torch.bfloat16"),
        ({"mask": torch.ones(2)}, r"mask must be \(3,\) on cpu"),
        ({"num_segments": -1}, "num_segments must not be negative, got -1"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"values": torch.zeros(3), "segment_ids": torch.tensor([0, 1, 2]), "num_segments": 3} | change
    with pytest.raises(ValueError, match=message):
        segment_sums(**arguments)
