"""balanced_partition: every item once, no bin over its limit, loads as equal as longest-first greedy promises."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gft_megatron.ops import balanced_partition

LENGTHS = st.lists(st.integers(0, 4096), max_size=60)


def loads(lengths: list[int], bins: list[list[int]]) -> list[int]:
    return [sum(lengths[i] for i in members) for members in bins]


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3))
def test_every_item_is_in_one_bin_and_no_bin_is_overfull(lengths: list[int], num_bins: int, slack: int) -> None:
    max_items = -(-len(lengths) // num_bins) + slack
    bins = balanced_partition(lengths, num_bins, max_items)
    assert len(bins) == num_bins
    assert sorted(itertools.chain.from_iterable(bins)) == list(range(len(lengths)))
    assert all(members == sorted(members) and len(members) <= max_items for members in bins)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_heaviest_bin_is_within_a_third_of_the_best_possible(lengths: list[int], num_bins: int) -> None:
    assignments = itertools.product(range(num_bins), repeat=len(lengths))
    best = min(
        max(sum(length for length, at in zip(lengths, bins, strict=True) if at == b) for b in range(num_bins))
        for bins in assignments
    )
    heaviest = max(loads(lengths, balanced_partition(lengths, num_bins)))
    assert heaviest <= best * (4 / 3 - 1 / (3 * num_bins)) + 1e-9  # Graham 1969


def test_ties_go_to_the_first_item_and_the_first_bin() -> None:
    assert balanced_partition([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert balanced_partition([1, 9, 1, 9, 2], 3) == [[1], [3], [0, 2, 4]]


def test_limit_on_items_outweighs_balance() -> None:
    assert balanced_partition([9, 1, 1, 1], 2) == [[0], [1, 2, 3]]
    assert balanced_partition([9, 1, 1, 1], 2, max_items=2) == [[0, 3], [1, 2]]


def test_more_bins_than_items_leaves_bins_empty() -> None:
    assert balanced_partition([], 2) == [[], []]
    assert balanced_partition([3], 3) == [[0], [], []]


@pytest.mark.parametrize(
    "lengths, num_bins, max_items, message",
    [
        ([1], 0, None, "num_bins must be at least 1, got 0"),
        ([1, -2], 1, None, "a length is negative: -2"),
        ([1, 1, 1], 2, 1, "3 items do not fit into 2 bins of at most 1"),
    ],
)
def test_impossible_requests_are_named(lengths: list[int], num_bins: int, max_items: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_partition(lengths, num_bins, max_items)
