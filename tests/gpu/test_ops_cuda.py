"""The CUDA operators against dense float64, and against the CPU operators."""

import pytest
import torch
from oracle import assert_grad_close, dense_answer
from torch import Tensor

from gft_megatron import vocab_parallel_log_probs
from gft_megatron.ops import build_info

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.skipif(not build_info()["cuda"], reason="built without the CUDA operators"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURE = 0.7


def make_rows(n: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(n * 1_000_003 + vocab)
    logits = torch.randn(n, vocab, generator=generator, device="cuda") * 4
    return logits.to(dtype), torch.randint(vocab, (n,), generator=generator, device="cuda")


def check_against_dense(
    logits: Tensor, labels: Tensor, *, inplace: bool = False, vocab_size: int | None = None
) -> Tensor:
    grads = tuple(torch.randn(2, len(labels), generator=torch.Generator("cuda").manual_seed(3), device="cuda"))
    expected = dense_answer(logits, labels, *grads, temperature=TEMPERATURE, vocab_size=vocab_size)
    leaf = logits.detach().clone().requires_grad_() if inplace else logits.detach().requires_grad_()
    log_probs, entropy = vocab_parallel_log_probs(
        leaf * 1 if inplace else leaf,
        labels,
        temperature=TEMPERATURE,
        with_entropy=True,
        inplace_backward=inplace,
        vocab_size=vocab_size,
    )
    torch.testing.assert_close(log_probs.double(), expected.log_probs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=1e-6, atol=5e-6)
    torch.autograd.backward([log_probs, entropy], grads)
    assert_grad_close(leaf.grad, expected.grad)
    return leaf.grad


# 8192 rows fill the GPU; 70000 rows exceed the 65535 blocks that two of the three grid dimensions take.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, vocab", [(5, 1), (5, 7), (5, 77), (5, 1000), (1, 1000), (3, 50257), (3, 151936), (512, 32000), (70000, 9)]
)
def test_matches_dense(n: int, vocab: int, dtype: torch.dtype) -> None:
    check_against_dense(*make_rows(n, vocab, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(9))
def test_matches_dense_at_every_alignment(dtype: torch.dtype, offset: int) -> None:
    # Out of place the gradient is aligned and the logits are not: the scalar kernel.
    wide, labels = make_rows(5, 5003, dtype)
    check_against_dense(wide[:, offset : offset + 4990], labels.clamp(max=4989))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [77, 5003, 50257])
def test_in_place_gradient_is_the_same_bits(dtype: torch.dtype, vocab: int) -> None:
    logits, labels = make_rows(7, vocab, dtype)
    assert torch.equal(check_against_dense(logits, labels, inplace=True), check_against_dense(logits, labels))


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_ignored_rows_and_unlikely_tokens(dtype: torch.dtype) -> None:
    logits, labels = make_rows(6, 5003, dtype)
    labels = labels.clamp(max=4999)
    logits[:, 5000:] = float("nan")
    logits[1] = float("nan")
    labels[1] = -100
    logits[2, ::2] = float("-inf")
    labels[2] = 1
    logits[3, :4096] = float("-inf")
    labels[3] = 4500
    grad = check_against_dense(logits, labels, vocab_size=5000)
    assert not grad[:, 5000:].any() and not grad[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logits_near_ten_thousand(dtype: torch.dtype, offset: float) -> None:
    logits, labels = make_rows(6, 5003, torch.float32)
    check_against_dense((logits + offset).to(dtype), labels)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 5, 4095, 9000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_never_hidden(dtype: torch.dtype, poison: float, column: int) -> None:
    logits, labels = make_rows(3, 9001, dtype)
    logits[1, column] = poison
    logits[2] = float("-inf")
    logits[2, column] = poison
    log_probs, entropy = vocab_parallel_log_probs(logits, labels, with_entropy=True)
    assert log_probs.isnan().tolist() == entropy.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    logits, labels = make_rows(64, 50257, dtype)
    first, second = (check_against_dense(logits, labels) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_on_the_gpu_agree_with_shards_on_the_cpu(dtype: torch.dtype) -> None:
    ops = torch.ops.gft_megatron
    logits, labels = make_rows(6, 1001, dtype)
    labels[0] = -100
    results = []
    for device in ("cuda", "cpu"):
        x, y = logits.to(device), labels.to(device)
        stats = torch.stack([ops.row_stats(x[:, a:b], y, a, b - a, 1.0, True) for a, b in ((0, 333), (333, 1001))])
        results.append([result.cpu() for result in ops.combine_stats(stats)])
    torch.testing.assert_close(*results, rtol=2e-6, atol=5e-6)
