"""Every row once an epoch, whatever the sizes of the takes and wherever the run was resumed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gft_megatron.data.order import PromptOrder


@given(st.integers(1, 40), st.lists(st.integers(0, 60), max_size=8), st.integers(0, 2**40), st.booleans())
def test_each_row_once_an_epoch_and_resume_goes_on(num_rows: int, takes: list[int], seed: int, shuffle: bool) -> None:
    whole = PromptOrder(num_rows, seed, shuffle=shuffle).take(sum(takes))
    order, taken = PromptOrder(num_rows, seed, shuffle=shuffle), []
    for n in takes:
        taken += order.take(n)
        resumed = PromptOrder(num_rows, 0)
        resumed.load_state_dict(json.loads(json.dumps(order.state_dict())))
        order = resumed
    assert taken == whole and order.position == sum(takes)
    for start in range(0, len(whole) - num_rows + 1, num_rows):
        assert sorted(whole[start : start + num_rows]) == list(range(num_rows))


def test_order_is_random_in_seed_and_epoch_and_fixed_for_ever() -> None:
    rows = PromptOrder(8, 1).take(16)
    # Philox bits are the same in every version of NumPy: a change of these numbers breaks every resumed run.
    assert rows == [2, 0, 1, 4, 5, 6, 7, 3, 7, 1, 6, 3, 5, 0, 2, 4]
    assert PromptOrder(100, 1).take(100) != PromptOrder(100, 2).take(100)
    assert PromptOrder(3, 9, shuffle=False).take(7) == [0, 1, 2, 0, 1, 2, 0]


def test_resume_over_an_order_that_was_already_read() -> None:
    order, other = PromptOrder(50, 1), PromptOrder(50, 2)
    order.take(10), other.take(10)
    other.load_state_dict(order.state_dict())
    assert other.take(40) == order.take(40)


@pytest.mark.parametrize("change", [{"num_rows": 6}, {"fingerprint": "other"}])
def test_state_of_other_prompts_is_refused(change: dict) -> None:
    state = PromptOrder(5, 1, fingerprint="mine").state_dict() | change
    with pytest.raises(ValueError, match="made with other prompts .* --prompt-data"):
        PromptOrder(5, 1, fingerprint="mine").load_state_dict(state)


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        PromptOrder(0, 1)
    with pytest.raises(ValueError, match="--seed is -1"):
        PromptOrder(3, -1)
