"""Group advantages equal a float64 computation group by group, and the official GFT values."""

import math

import numpy as np
import pytest
import torch

from gft_megatron.advantages import group_advantages


@pytest.fixture(autouse=True, params=["compiled", "reference"])
def implementation(request, monkeypatch):
    monkeypatch.setenv("GFT_MEGATRON_REFERENCE", str(int(request.param == "reference")))


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("normalize", ["std", "none"])
def test_equals_numpy_per_group(ddof, normalize):
    generator = np.random.default_rng(0)
    group_ids = generator.permutation(np.repeat([7, -3, 100, 5], [8, 2, 5, 3]))
    rewards = generator.normal(size=18)
    expected = np.empty(18)
    for group in np.unique(group_ids):
        of = group_ids == group
        centred = rewards[of] - rewards[of].mean()
        expected[of] = centred / (rewards[of].std(ddof=ddof) + 1e-6) if normalize == "std" else centred
    got = group_advantages(torch.from_numpy(rewards), torch.from_numpy(group_ids), normalize=normalize, ddof=ddof)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(("num_right", "right", "wrong"), [(1, 2.475, -0.354), (4, 0.935, -0.935), (7, 0.354, -2.475)])
def test_official_values_of_binary_groups_of_eight(num_right, right, wrong):
    rewards = torch.tensor([1.0] * num_right + [0.0] * (8 - num_right))
    got = group_advantages(rewards, torch.zeros(8, dtype=torch.int64))
    assert got[0].item() == pytest.approx(right, abs=1e-3)
    assert got[-1].item() == pytest.approx(wrong, abs=1e-3)


@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_equal_rewards_give_exactly_zero(eps):
    # 0.1 has no exact binary form: its mean over 3 is off by one ulp.
    got = group_advantages(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int64), eps=eps)
    assert got.tolist() == [0.0, 0.0, 0.0]


def test_group_of_one_keeps_its_reward():
    got = group_advantages(torch.tensor([0.25, 1.0, 0.0]), torch.tensor([4, 9, 9]))
    assert got[0].item() == 0.25
    assert got[1].item() == pytest.approx(1 / math.sqrt(2), rel=1e-5)


def test_no_sample_at_all():
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "group_ids", "normalize", "message"),
    [
        (torch.zeros(3), torch.zeros(2, dtype=torch.int64), "std", "alike"),
        (torch.zeros(2), torch.tensor([0.1, 0.9]), "std", "group_ids must be integers, got torch.float32"),
        (torch.tensor([1.0, math.nan]), torch.zeros(2, dtype=torch.int64), "std", "finite"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), "batch", "normalize must be one of"),
    ],
)
def test_bad_input_is_named(rewards, group_ids, normalize, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, group_ids, normalize=normalize)
