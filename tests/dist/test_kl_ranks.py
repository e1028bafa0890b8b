"""vocab_parallel_kl on tensor-parallel ranks: the dense answer, the same bits everywhere, one collective."""

import pytest
import torch
import torch.distributed as dist
from oracle import assert_kl_grad_close, dense_kl
from ranks import count_collectives, run_on_ranks
from torch import Tensor

from gft_megatron import vocab_parallel_kl

TEMPERATURE = 0.7


def make_case(world_size: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Both logits [12, p * width] and labels [12], the same on every rank."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(12, world_size * width, generator=generator) * 4
    ref_logits = logits + torch.randn(logits.shape, generator=generator)
    ref_logits[0] = logits[0]
    labels = torch.zeros(12, dtype=torch.int64)
    logits[:, vocab:] = ref_logits[:, vocab:] = float("nan")  # padding
    logits[7] = ref_logits[7, 3] = float("nan")
    labels[7] = -100
    logits[8, : vocab // 2] = ref_logits[8, : vocab // 2] = float("-inf")  # a whole shard has nothing to say
    logits[9, : vocab // 2] = float("-inf")
    logits[10] += 1e4
    logits[11, 5] = ref_logits[11, vocab - 1] = 200.0  # each has its mass in another shard
    return logits.to(dtype), ref_logits.to(dtype), labels


def check_case(rank: int, world_size: int, calls: list[str], width: int, vocab: int, dtype: torch.dtype) -> None:
    logits, ref_logits, labels = make_case(world_size, width, vocab, dtype)
    grad_kl = torch.randn(12, generator=torch.Generator().manual_seed(3))
    expected = dense_kl(logits, ref_logits, grad_kl, labels=labels, temperature=TEMPERATURE, vocab_size=vocab)
    columns = slice(rank * width, (rank + 1) * width)
    leaf = logits[:, columns].clone().requires_grad_()

    calls.clear()
    kl = vocab_parallel_kl(
        leaf,
        ref_logits[:, columns],
        labels=labels,
        tp_group=dist.group.WORLD,
        temperature=TEMPERATURE,
        vocab_size=vocab,
    )
    assert calls == ["all_gather_into_tensor"]
    kl.backward(grad_kl)
    assert calls == ["all_gather_into_tensor"]

    torch.testing.assert_close(kl.double(), expected.kl, rtol=1e-6, atol=1e-6)
    assert kl[0] == 0 and not leaf.grad[0].any()
    assert kl[9].isinf() and kl[11] > 100
    assert_kl_grad_close(leaf.grad, expected.grad[:, columns], expected.size[:, columns])
    assert not leaf.grad[:, max(vocab - rank * width, 0) :].any()

    everyone = [torch.empty_like(kl) for _ in range(world_size)]
    dist.all_gather(everyone, kl.detach())
    assert all(torch.equal(other, kl) for other in everyone)


def check_cases(rank: int, world_size: int, cases: list[tuple]) -> None:
    calls = count_collectives()
    for case in cases:
        check_case(rank, world_size, calls, *case)


# Padding: none, a part of the last shard, all of the last and more.
@pytest.mark.parametrize(
    "world_size, cases",
    [
        (2, [(500, 1000, torch.float32), (500, 400, torch.float16)]),
        (3, [(333, 994, torch.bfloat16), (333, 600, torch.float32)]),
    ],
)
def test_matches_dense(world_size: int, cases: list[tuple]) -> None:
    run_on_ranks(check_cases, world_size, cases)
