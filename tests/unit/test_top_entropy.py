"""The entropy of the likeliest tokens against a float64 computation, whole and from shards."""

import pytest
import torch
from logits_rows import make_rows
from ranks import run_on_ranks

from gft_megatron.ops import vocab_parallel_top_entropy


def dense(logits, top_k, temperature, vocab):
    largest = (logits.double()[:, :vocab] / temperature).sort(descending=True).values[:, :top_k]
    probs = largest.softmax(-1)
    return -(probs * probs.clamp(min=1e-300).log()).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "vocab"), [(1, 131), (20, 131), (20, 125), (200, 131)])
def test_equals_float64(dtype, top_k, vocab):
    logits, _ = make_rows(9, 131, dtype)
    got = vocab_parallel_top_entropy(logits, top_k=top_k, temperature=0.7, vocab_size=vocab)
    torch.testing.assert_close(got.double(), dense(logits, top_k, 0.7, vocab), rtol=1e-5, atol=1e-6)
    assert not got.requires_grad


def test_what_is_refused():
    with pytest.raises(ValueError, match="top_k is 0"):
        vocab_parallel_top_entropy(torch.zeros(2, 3), top_k=0)


def on_rank(rank, world_size):
    logits, _ = make_rows(9, 44 * world_size, torch.float32)
    for vocab in (44 * world_size, 44 * world_size - 50):  # the last shard has no column left
        got = vocab_parallel_top_entropy(
            logits[:, 44 * rank : 44 * (rank + 1)],
            top_k=50,
            tp_group=torch.distributed.group.WORLD,
            vocab_size=vocab,
        )
        torch.testing.assert_close(got.double(), dense(logits, 50, 1.0, vocab), rtol=1e-5, atol=1e-6)


def test_shards_give_the_whole():
    run_on_ranks(on_rank, 3)
