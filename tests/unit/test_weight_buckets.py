"""Weights on their way to servers: packed into buckets and found again, and never sent where they must not go."""

from __future__ import annotations

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gft_megatron.rollout.sglang.weight_sync.buckets import Bucket, buckets
from gft_megatron.rollout.sglang.weight_sync.from_tensor import refuse_other_machine

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.float64]


def collect(tensors: list[tuple[str, Tensor]], max_bytes: int) -> list[tuple[Bucket, list[tuple[str, Tensor]]]]:
    """Each bucket, and copies of its tensors as they were before the next was asked for."""

    async def run() -> list[tuple[Bucket, list[tuple[str, Tensor]]]]:
        return [
            (bucket, [(name, tensor.clone()) for name, tensor in bucket.tensors()])
            async for bucket in buckets(iter(tensors), max_bytes)
        ]

    return asyncio.run(run())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3), st.sampled_from(DTYPES)), max_size=12),
    st.integers(1, 400),
)
def test_every_tensor_arrives_once_in_order(sizes: list[tuple[int, int, torch.dtype]], max_bytes: int) -> None:
    given_tensors = [
        (f"{i}", torch.randint(0, 100, (rows, columns)).to(dtype)) for i, (rows, columns, dtype) in enumerate(sizes)
    ]
    found = collect(given_tensors, max_bytes)
    arrived = [item for _, items in found for item in items]
    assert [name for name, _ in arrived] == [name for name, _ in given_tensors]
    for (_, tensor), (_, expected) in zip(arrived, given_tensors, strict=True):
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
    for bucket, items in found:
        assert bucket.data.nbytes <= max_bytes or len(items) == 1
        offset = 0  # SGLang refuses a tensor that does not begin at a multiple of its element's size
        for _, tensor in items:
            assert offset % tensor.dtype.itemsize == 0
            offset += tensor.nbytes
    assert [bucket.is_last for bucket, _ in found] == [False] * (len(found) - 1) + [True] * bool(found)


def test_the_event_loop_has_its_turn_after_every_tensor() -> None:
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def run() -> None:
        counter = asyncio.create_task(count_turns())
        async for _ in buckets([(str(i), torch.zeros(4)) for i in range(20)], max_bytes=10_000):
            pass
        counter.cancel()

    asyncio.run(run())
    assert turns >= 20


def test_a_bucket_of_strided_views_holds_their_values() -> None:
    whole = torch.arange(24.0).view(4, 6)
    ((_, items),) = collect([("t", whole.t()), ("column", whole[:, 1])], 1000)
    assert torch.equal(items[0][1], whole.t())
    assert torch.equal(items[1][1], whole[:, 1])


def test_tensors_go_to_servers_on_this_machine_only() -> None:
    refuse_other_machine("http://127.0.0.1:30000")
    refuse_other_machine("http://localhost:30000")
    with pytest.raises(ValueError, match=r"http://192\.0\.2\.7:30000 is not on this machine.*'distributed' or 'disk'"):
        refuse_other_machine("http://192.0.2.7:30000")
