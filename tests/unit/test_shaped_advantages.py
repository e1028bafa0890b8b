"""What is compared in a group, and of which rewards: the flags behind advantages, against numbers by hand."""

import dataclasses
import math

import pytest
import torch

from gft_megatron.groups import Batch, Group, Prompt, Sample, Source
from gft_megatron.rollout.engine import SamplingParams
from gft_megatron.rollout.outcome import trained_part
from gft_megatron.rollout.recipe import GroupRecipe, overlong_penalty, recipe_advantages

# Two groups: an expert, two teachers, two own samples; and an expert with two own ones.
SOURCES = torch.tensor([0, 1, 1, 2, 2, 0, 2, 2])
GROUPS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
HALVES = (math.sqrt(0.5), -math.sqrt(0.5))
REWARDS = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.5, 0.0])


def recipe_of(**options):
    sampling = SamplingParams(max_new_tokens=10)
    return GroupRecipe(n_expert=1, n_teacher=2, n_self=2, sampling=sampling, **{"needs_advantages": True, **options})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"needs_advantages": False}, [1.0] * 8),
        # Means 0.6 and 0.5; sums of squares 1.2 and 0.5.
        ({"advantage_normalization": "none"}, [0.4, 0.4, -0.6, 0.4, -0.6, 0.5, 0.0, -0.5]),
        (
            {"advantage_ddof": 1},
            [*(d / math.sqrt(1.2 / 4) for d in (0.4, 0.4, -0.6, 0.4, -0.6)), 1.0, 0.0, -1.0],
        ),
        (
            {"advantage_ddof": 0},
            [*(d / math.sqrt(1.2 / 5) for d in (0.4, 0.4, -0.6, 0.4, -0.6)), math.sqrt(1.5), 0.0, -math.sqrt(1.5)],
        ),
        # n / (n - 1) of the distance from the mean.
        ({"advantage_normalization": "leave-one-out"}, [0.5, 0.5, -0.75, 0.5, -0.75, 0.75, 0.0, -0.75]),
        # Pairs of teachers, of own samples; an expert is alone and keeps its reward.
        (
            {"compare_own_source": True, "advantage_normalization": "none"},
            [1.0, 0.5, -0.5, 0.5, -0.5, 1.0, 0.25, -0.25],
        ),
        ({"compare_own_source": True, "advantage_ddof": 0}, [1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0]),
        ({"compare_own_source": True}, [1.0, *HALVES, *HALVES, 1.0, *HALVES]),
    ],
)  # fmt: skip
def test_who_is_compared_with_whom(options, expected):
    got = recipe_advantages(REWARDS, GROUPS, SOURCES, recipe_of(**options))
    assert got.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_overlong_penalty():
    lengths = torch.tensor([1, 6, 7, 8, 9, 10, 11])
    assert overlong_penalty(lengths, longest=10, buffer=4).tolist() == [0, 0, -0.25, -0.5, -0.75, -1, -1]
    assert overlong_penalty(lengths, longest=10, buffer=0).tolist() == [0] * 7


def batch_of(*samples):
    """A group for each list of (source, response length, reward, truncated)."""
    made = [
        Group(
            Prompt(row, torch.tensor([3, 4]).numpy(), "x"),
            tuple(
                Sample(source, torch.arange(length).numpy(), "", reward, truncated=truncated)
                for source, length, reward, truncated in of_group
            ),
        )
        for row, of_group in enumerate(samples)
    ]
    return Batch.from_groups(made, list(range(len(made))))


EXPERT, OWN = Source.EXPERT, Source.SELF
BATCH = batch_of(
    [(EXPERT, 9, 1.0, False), (OWN, 4, 1.0, False), (OWN, 9, 1.0, False), (OWN, 10, 0.0, True)],
    [(EXPERT, 3, 1.0, False), (OWN, 3, 1.0, False)],
    [(EXPERT, 3, 1.0, False), (OWN, 10, 0.0, True)],
)


def test_only_own_samples_are_punished_for_length():
    """Of the response without its prompt; the batch's own rewards stay."""
    recipe = recipe_of(overlong_buffer_len=4)
    assert recipe.shaped_rewards(BATCH).tolist() == [1.0, 1.0, 0.25, -1.0, 1.0, 1.0, 1.0, -1.0]
    assert recipe_of().shaped_rewards(BATCH).tolist() == BATCH.rewards.tolist()


def test_truncated_samples_are_left_out_after_their_groups_were_compared():
    advantages = recipe_advantages(BATCH.rewards, BATCH.group_ids, BATCH.sources, recipe_of(advantage_ddof=0))
    batch = Batch(**{**vars(BATCH), "advantages": advantages})
    left = trained_part(batch, skip_zero_variance=False, mask_truncated=True)
    assert left.lengths.tolist() == [11, 6, 11, 5, 5, 5] and not left.truncated.any()
    # 1, 1, 1, 0 has mean 3/4 and deviation sqrt(3)/4: the zero counts, though it is not trained on.
    assert left.advantages.tolist() == pytest.approx([math.sqrt(1 / 3)] * 3 + [0.0, 0.0, 1.0], rel=1e-5)
    assert trained_part(batch, skip_zero_variance=True, mask_truncated=True).rows.tolist() == [0, 0, 0, 2]
    assert trained_part(batch, skip_zero_variance=True, mask_truncated=False).rows.tolist() == [0, 0, 0, 0, 2, 2]
    # A divergence in the rewards makes all of them unequal, but groups are judged by what they were before.
    shaped = dataclasses.replace(batch, advantages=torch.full_like(batch.advantages, 0.5))
    left = trained_part(shaped, skip_zero_variance=True, mask_truncated=False, advantages=batch.advantages)
    assert left.rows.tolist() == [0, 0, 0, 0, 2, 2] and left.advantages.tolist() == [0.5] * 6
    assert trained_part(batch, skip_zero_variance=False, mask_truncated=False).rows.tolist() == batch.rows.tolist()
