"""The CUDA operators against dense float64, and against the CPU operators. `bash tests/gpu/run.sh` builds and runs."""

import pytest
import torch
from oracle import assert_promised_grad, dense_answer
from torch import Tensor

from gft_megatron import vocab_parallel_kl, vocab_parallel_log_probs
from gft_megatron.ops import build_info

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.skipif(not build_info()["cuda"], reason="built without the CUDA operators"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURE = 1 / 1.4375  # its inverse is exact in fp32


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
    options = {"temperature": TEMPERATURE, "vocab_size": vocab_size}
    assert_promised_grad(leaf.grad, expected.grad, logits, labels, *grads, **options)
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


@pytest.mark.parametrize("used", ["log_probs", "entropy"])
def test_output_without_gradient_contributes_none(used: str) -> None:
    logits, labels = make_rows(5, 5003, torch.float32)
    grad, zero = torch.randn(5, generator=torch.Generator("cuda").manual_seed(3), device="cuda"), torch.zeros(5).cuda()
    grads = (grad, zero) if used == "log_probs" else (zero, grad)
    leaf = logits.clone().requires_grad_()
    outputs = dict(
        zip(("log_probs", "entropy"), vocab_parallel_log_probs(leaf, labels, with_entropy=True), strict=True)
    )
    outputs[used].backward(grad)
    assert_promised_grad(leaf.grad, dense_answer(logits, labels, *grads).grad, logits, labels, *grads)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_on_the_gpu_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    """Plain PyTorch there, in blocks: 60 rows of this vocabulary are three."""
    logits, labels = make_rows(60, 151936, dtype)
    ref_logits = (logits.float() + torch.sin(logits.float() * 7)).to(dtype)
    logits[:, 151900:] = logits[1] = float("nan")
    logits[2, ::2] = ref_logits[2, ::2] = float("-inf")
    labels = labels.clamp(max=151899)
    labels[1] = -100
    results = []
    for device in ("cuda", "cpu"):
        leaf = logits.to(device).requires_grad_()
        options = {"labels": labels.to(device), "temperature": TEMPERATURE, "vocab_size": 151900}
        kl = vocab_parallel_kl(leaf, ref_logits.to(device), **options)
        kl.sum().backward()
        results.append((kl.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-6)


# Few rows: the vocabulary is split over blocks, and a second kernel merges what they found.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, vocab", [(1, 151936), (1, 300_000), (7, 32769), (263, 32768), (265, 32768)])
def test_few_long_rows_match_dense(n: int, vocab: int, dtype: torch.dtype) -> None:
    logits, labels = make_rows(n, vocab, dtype)
    logits[0, : vocab - 5000] = float("-inf")  # the first blocks find nothing
    labels[0] = vocab - 1
    check_against_dense(logits, labels)


def check_sweep(logits: Tensor, labels: Tensor, *, inplace: bool = False, vocab_size: int | None = None) -> Tensor:
    vocab = logits.shape[1] if vocab_size is None else vocab_size
    n = len(labels)
    zero = torch.zeros(n, device="cuda")
    weight = torch.randn(n, generator=torch.Generator("cuda").manual_seed(5), device="cuda")
    before = logits.clone()
    probs = dense_answer(before, labels, zero, zero, temperature=TEMPERATURE, vocab_size=vocab_size).log_probs.exp()
    tau = (probs * torch.tensor([0.5, 2.0], device="cuda").repeat(n)[:n]).float()
    grad = logits if inplace else torch.full_like(logits, float("nan"))
    log_prob = torch.ops.gft_megatron.rectified_sweep_(logits, grad, labels, vocab, 1 / TEMPERATURE, weight, tau)
    grad_log_prob = -weight * torch.where(probs < tau.double(), log_prob.double().exp(), 1.0)
    expected = dense_answer(before, labels, grad_log_prob, zero, temperature=TEMPERATURE, vocab_size=vocab_size)
    torch.testing.assert_close(log_prob.double(), expected.log_probs, rtol=1e-6, atol=1e-5)
    options = {"temperature": TEMPERATURE, "vocab_size": vocab_size}
    assert_promised_grad(grad, expected.grad, before, labels, grad_log_prob, zero, **options)
    return grad


# From one block a row to eight, and a row that not even those can hold.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, vocab", [(5, 1), (9, 77), (5, 5003), (70000, 9), (64, 32000), (5, 50257), (33, 151936), (3, 1_200_001)]
)
def test_sweep_matches_dense(n: int, vocab: int, dtype: torch.dtype) -> None:
    check_sweep(*make_rows(n, vocab, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [77, 50257, 151936])
def test_sweep_in_place_is_the_same_bits(dtype: torch.dtype, vocab: int) -> None:
    logits, labels = make_rows(64, vocab, dtype)
    first = check_sweep(logits, labels)
    assert torch.equal(first, check_sweep(logits, labels))
    assert torch.equal(first, check_sweep(logits, labels, inplace=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(9))
def test_sweep_at_every_alignment(dtype: torch.dtype, offset: int) -> None:
    wide, labels = make_rows(5, 60003, dtype)
    check_sweep(wide[:, offset : offset + 59990], labels.clamp(max=59989))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sweep_of_padding_ignored_rows_and_unlikely_tokens(dtype: torch.dtype) -> None:
    logits, labels = make_rows(4, 60003, dtype)
    labels = labels.clamp(max=59999)
    logits[:, 60000:] = float("nan")
    logits[1] = float("nan")
    labels[1] = -100
    logits[2, :40000] = float("-inf")
    labels[2] = 45000
    grad = check_sweep(logits, labels, vocab_size=60000)
    assert not grad[:, 60000:].any() and not grad[1].any()


@pytest.mark.parametrize("with_mask", [False, True])
def test_segment_sums(with_mask: bool) -> None:
    lengths = torch.tensor([0, 1, 300, 0, 70_000, 5, 0])
    ids = torch.cat([torch.arange(7).repeat_interleave(lengths), torch.full((4,), 7)])
    values = torch.randn(len(ids), generator=torch.Generator().manual_seed(2)) * 1e3
    mask = torch.arange(len(ids)) % 3 > 0 if with_mask else None
    if with_mask:
        values[~mask] = float("nan")
    arguments = (values, mask, ids, 7)
    on_gpu = [argument.cuda() if isinstance(argument, Tensor) else argument for argument in arguments]
    sums, counts = torch.ops.gft_megatron.segment_sums(*on_gpu)
    live = torch.ones(len(ids), dtype=torch.bool) if mask is None else mask
    expected = torch.zeros(8, dtype=torch.float64).index_add_(0, ids[live], values[live].double())[:7]
    torch.testing.assert_close(sums.cpu().double(), expected, rtol=1e-7, atol=1e-9)
    assert counts.tolist() == torch.bincount(ids[live], minlength=8)[:7].tolist()
    assert torch.equal(sums, torch.ops.gft_megatron.segment_sums(*on_gpu)[0])


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("ddof", [0, 1])
def test_group_advantages_agree_with_the_cpu(divide: bool, ddof: int) -> None:
    ids = torch.arange(300).repeat_interleave(torch.arange(300) % 17 + 1)
    rewards = torch.randn(len(ids), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rewards[ids % 5 == 0] = 0.1
    op = torch.ops.gft_megatron.group_advantages
    torch.testing.assert_close(
        op(rewards.cuda(), ids.cuda(), divide, ddof, 1e-6).cpu(),
        op(rewards, ids, divide, ddof, 1e-6),
        rtol=2e-7,
        atol=0,
    )


@pytest.mark.parametrize("with_entropy", [False, True])
def test_linear_log_probs_matches_dense(with_entropy: bool) -> None:
    from gft_megatron.ops import linear_log_probs

    generator = torch.Generator("cuda").manual_seed(4)
    hidden = torch.randn(600, 96, generator=generator, device="cuda").requires_grad_()
    weight = torch.randn(5003, 96, generator=generator, device="cuda").mul_(0.1).requires_grad_()
    labels = torch.randint(5003, (600,), generator=generator, device="cuda")
    labels[::4] = -100
    upstream = (
        torch.randn(2, 600, generator=generator, device="cuda") * torch.tensor([[1.0], [float(with_entropy)]]).cuda()
    )
    log_probs, entropy = linear_log_probs(hidden, weight, labels, with_entropy=with_entropy, chunk_tokens=128)
    outputs = [log_probs, entropy] if with_entropy else [log_probs]
    torch.autograd.backward(outputs, list(upstream[: len(outputs)]))

    h, w = hidden.detach().double(), weight.detach().double()
    expected = dense_answer(h @ w.t(), labels, *upstream)
    torch.testing.assert_close(log_probs.double(), expected.log_probs, rtol=1e-5, atol=5e-5)
    if with_entropy:
        torch.testing.assert_close(entropy.double(), expected.entropy, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(hidden.grad.double(), expected.grad @ w, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), expected.grad.t() @ h, rtol=1e-4, atol=1e-4)


def run_every_operator(logits: Tensor, labels: Tensor) -> list[Tensor]:
    ops = torch.ops.gft_megatron
    n, vocab = logits.shape
    one = torch.ones(n, device=logits.device)
    results = list(ops.combine_stats(ops.row_stats(logits, labels, 0, vocab, 1.0, True)[None]))
    grad, swept = torch.empty_like(logits), torch.empty_like(logits)
    log_prob, entropy, maximum, log_sum = results
    ops.row_grad_(logits, grad, labels, 0, vocab, 1.0, maximum, log_sum, entropy, one, one)
    results += [grad, ops.rectified_sweep_(logits, swept, labels, vocab, 1.0, one, one), swept]
    ids = torch.arange(n, device=logits.device) // 4
    results += [*ops.segment_sums(log_prob, None, ids, n), ops.group_advantages(log_prob.double(), ids, True, 1, 1e-6)]
    return results


def test_operators_run_on_the_current_stream() -> None:
    logits, labels = make_rows(8, 50257, torch.bfloat16)
    expected = run_every_operator(logits, labels)
    late = torch.full_like(logits, float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # cycles; on another stream the operators would not wait for the copy
        late.copy_(logits)
        actual = run_every_operator(late, labels)
        torch.cuda.current_stream().synchronize()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_operators_run_on_the_device_of_their_tensors() -> None:
    logits, labels = make_rows(8, 50257, torch.bfloat16)
    expected = run_every_operator(logits, labels)
    assert torch.cuda.current_device() == 0
    for a, b in zip(run_every_operator(logits.to("cuda:1"), labels.to("cuda:1")), expected, strict=True):
        assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu())
