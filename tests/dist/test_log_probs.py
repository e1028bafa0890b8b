"""vocab_parallel_log_probs on tensor-parallel ranks: the dense answer, the same bits everywhere, one collective."""

import pytest
import torch
import torch.distributed as dist
from oracle import assert_grad_close, dense_answer
from ranks import count_collectives, run_on_ranks
from torch import Tensor

from gft_megatron import vocab_parallel_log_probs

TEMPERATURE = 0.7


def make_case(world_size: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [12, p * width], the same on every rank, with one label in every corner of every shard."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(12, world_size * width, generator=generator) * 4).to(dtype)
    corners = [label for r in range(world_size) for label in (r * width, min((r + 1) * width, vocab) - 1)]
    labels = torch.randint(vocab, (12,), generator=generator)
    labels[: len(corners)] = torch.tensor([min(label, vocab - 1) for label in corners])
    logits[:, vocab:] = float("nan")  # padding
    logits[7] = float("nan")
    labels[7] = -100
    logits[8, : vocab // 2] = float("-inf")  # the first of two shards has nothing to say
    labels[8] = vocab - 1
    return logits, labels


def check_case(
    rank: int, world_size: int, calls: list[str], width: int, vocab: int, dtype: torch.dtype, inplace: bool
) -> None:
    logits, labels = make_case(world_size, width, vocab, dtype)
    grads = tuple(torch.randn(2, 12, generator=torch.Generator().manual_seed(3)))
    expected = dense_answer(logits, labels, *grads, temperature=TEMPERATURE, vocab_size=vocab)
    columns = slice(rank * width, (rank + 1) * width)
    leaf = logits[:, columns].clone().requires_grad_()

    calls.clear()
    log_probs, entropy = vocab_parallel_log_probs(
        leaf * 1,
        labels,
        tp_group=dist.group.WORLD,
        temperature=TEMPERATURE,
        with_entropy=True,
        inplace_backward=inplace,
        vocab_size=vocab,
    )
    assert calls == ["all_gather_into_tensor"]
    torch.autograd.backward([log_probs, entropy], grads)
    assert calls == ["all_gather_into_tensor"]

    torch.testing.assert_close(log_probs.double(), expected.log_probs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=1e-6, atol=5e-6)
    assert_grad_close(leaf.grad, expected.grad[:, columns])
    padding = slice(max(vocab - rank * width, 0), None)
    assert not leaf.grad[:, padding].any()

    mine = torch.stack([log_probs.detach(), entropy.detach()])
    everyone = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(everyone, mine)
    assert all(torch.equal(other, mine) for other in everyone)


def check_cases(rank: int, world_size: int, cases: list[tuple]) -> None:
    calls = count_collectives()
    for case in cases:
        check_case(rank, world_size, calls, *case)


# 500: aligned. 333: not a multiple of any vector. Padding: none, a part of the last shard, all of the last and more.
@pytest.mark.parametrize(
    "world_size, cases",
    [
        (2, [(500, 1000, torch.float32, False), (500, 400, torch.float32, True)]),
        (3, [(333, 994, torch.bfloat16, True), (333, 600, torch.float16, False)]),
    ],
)
def test_matches_dense(world_size: int, cases: list[tuple]) -> None:
    run_on_ranks(check_cases, world_size, cases)


def check_subgroups(rank: int, world_size: int) -> None:
    """Ranks 0 and 2 share one model; rank 1 has another to itself."""
    logits, labels = make_case(2, 100, 200, torch.float32)
    logits = logits + (rank == 1)
    pair, single = dist.new_group([0, 2]), dist.new_group([1])
    shard = {0: logits[:, :100], 1: logits, 2: logits[:, 100:]}[rank]
    calls = count_collectives()
    log_probs, _ = vocab_parallel_log_probs(shard, labels, tp_group=single if rank == 1 else pair)
    assert calls == ([] if rank == 1 else ["all_gather_into_tensor"])
    expected = dense_answer(logits, labels, torch.zeros(12), torch.zeros(12)).log_probs
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-6, atol=1e-5)


def test_groups_that_are_not_the_world() -> None:
    run_on_ranks(check_subgroups, 3)


def check_compiled(rank: int, world_size: int) -> None:
    """One graph with the collective inside; the same graph for two batches of different size."""
    logits, labels = make_case(world_size, 100, 200, torch.float32)
    columns = slice(rank * 100, (rank + 1) * 100)

    def fn(shard: Tensor, labels: Tensor) -> Tensor:
        log_probs, entropy = vocab_parallel_log_probs(
            shard, labels, tp_group=dist.group.WORLD, temperature=TEMPERATURE, with_entropy=True
        )
        return (log_probs * torch.arange(len(labels)) + entropy).sum()

    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=True)
    calls = count_collectives()
    for n in (12, 7):
        grads = torch.arange(n), torch.ones(n)
        expected = dense_answer(logits[:n], labels[:n], *grads, temperature=TEMPERATURE)
        results = []
        for function in (fn, compiled):
            leaf = logits[:n, columns].clone().requires_grad_()
            calls.clear()
            function(leaf * 1, labels[:n]).backward()
            assert calls == ["all_gather_into_tensor"]
            assert_grad_close(leaf.grad, expected.grad[:, columns])
            results.append(leaf.grad)
        torch.testing.assert_close(*results)


def test_compiled_graph_matches_dense() -> None:
    run_on_ranks(check_compiled, 2)
