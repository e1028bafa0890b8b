"""The CUDA kernels, run on the host by tests/cuda_on_host, against dense float64 and against the CPU operators.

The emulation also fails on reads and writes outside of the tensors, on vectors that are not aligned, on block memory
that nobody wrote or that has ended, and on barriers that a thread does not reach.
"""

import shutil
from collections.abc import Callable

import pytest
import torch
from cuda_on_host.emulator import CSRC, DTYPES, EmulatedGpu, build
from hypothesis import given, settings
from hypothesis import strategies as st
from logits_rows import make_rows, upstream
from oracle import assert_promised_grad, dense_answer
from torch import Tensor

from gft_megatron.ops.library import row_ops

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA toolkit, whose headers this needs")

OPS = row_ops(torch.device("cpu"))
INF, NAN = float("inf"), float("nan")
INV_TEMPERATURE = 1.4375  # exact in fp32: rounding it is not the kernels' error


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> EmulatedGpu:
    return EmulatedGpu(build(CSRC, tmp_path_factory.mktemp("cuda_on_host")))


def poisoned_like(gpu: EmulatedGpu, logits: Tensor, row_stride: int | None = None, *, at_start: bool = False) -> Tensor:
    return gpu.guarded(torch.full(logits.shape, NAN, dtype=logits.dtype), row_stride=row_stride, at_start=at_start)


def check_two_passes(
    gpu: EmulatedGpu,
    logits: Tensor,  # [n, v], guarded
    labels: Tensor,
    *,
    grad: Tensor | None = None,
    splits: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Compare statistics, values and gradients of one shard; return the gradient, written to `grad` where given."""
    vocab = logits.shape[1] if vocab_size is None else vocab_size
    options = {"temperature": 1 / INV_TEMPERATURE, "vocab_size": vocab}
    grads = upstream(len(labels))
    expected = dense_answer(logits, labels, *grads, **options)
    place = (0, vocab, INV_TEMPERATURE)
    stats = gpu.row_stats(logits, labels, *place, True, splits)
    log_prob, entropy, maximum, log_sum = gpu.combine_stats(stats[None])
    torch.testing.assert_close(log_prob.double(), expected.log_probs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=1e-6, atol=5e-6)

    without_entropy = gpu.row_stats(logits, labels, *place, False, splits)
    assert torch.equal(without_entropy[:, [0, 1, 3]], stats[:, [0, 1, 3]])
    assert without_entropy[labels >= 0, 2].isnan().all()

    alone = poisoned_like(gpu, logits)
    gpu.row_grad_(logits, alone, labels, *place, maximum, log_sum, entropy, grads[0], None)
    no_entropy = dense_answer(logits, labels, grads[0], torch.zeros(len(labels)), **options)
    assert_promised_grad(alone, no_entropy.grad, logits, labels, grads[0], torch.zeros(len(labels)), **options)
    grad = poisoned_like(gpu, logits) if grad is None else grad
    gpu.row_grad_(logits, grad, labels, *place, maximum, log_sum, entropy, *grads)
    assert_promised_grad(grad, expected.grad, logits, labels, *grads, **options)
    return grad


def check_sweep(
    gpu: EmulatedGpu,
    logits: Tensor,  # [n, v], guarded
    labels: Tensor,
    *,
    grad: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The same for the one sweep. Half of the rows have a tau below their probability."""
    vocab = logits.shape[1] if vocab_size is None else vocab_size
    options = {"temperature": 1 / INV_TEMPERATURE, "vocab_size": vocab}
    zero = torch.zeros(len(labels))
    weight = upstream(len(labels))[0]
    probs = dense_answer(logits, labels, zero, zero, **options).log_probs.exp()
    tau = (probs * torch.tensor([0.5, 2.0]).repeat(len(labels))[: len(labels)]).float()
    grad = poisoned_like(gpu, logits) if grad is None else grad
    before = logits.clone()  # the gradient may go over it
    log_prob = gpu.rectified_sweep_(logits, grad, labels, vocab, INV_TEMPERATURE, weight, tau)
    # The probability as returned: the error of log_prob, looked at next, is not the gradient's.
    grad_log_prob = -weight * torch.where(probs < tau.double(), log_prob.double().exp(), 1.0)
    expected = dense_answer(before, labels, grad_log_prob, zero, **options)
    torch.testing.assert_close(log_prob.double(), expected.log_probs, rtol=1e-6, atol=1e-5)
    assert_promised_grad(grad, expected.grad, before, labels, grad_log_prob, zero, **options)
    return grad


CHECKS = pytest.mark.parametrize("check", [check_two_passes, check_sweep])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
Check = Callable[..., Tensor]


# 1, 7 and 77 are shorter than what a block reads at once, 1000 and 8192 leave no tail, 50257 is odd: every row starts
# at another alignment.
@CHECKS
@EVERY_DTYPE
@pytest.mark.parametrize("n, vocab", [(5, 1), (5, 7), (9, 77), (3, 1000), (1, 8192), (3, 50257)])
def test_matches_dense(gpu: EmulatedGpu, check: Check, n: int, vocab: int, dtype: torch.dtype) -> None:
    logits, labels = make_rows(n, vocab, dtype)
    check(gpu, gpu.guarded(logits), labels)


@CHECKS
@EVERY_DTYPE
@pytest.mark.parametrize("offset", range(9))
def test_matches_dense_at_every_alignment(gpu: EmulatedGpu, check: Check, dtype: torch.dtype, offset: int) -> None:
    # The end of the last row is the end of the memory: the start moves. The gradient moves with it, then stays behind.
    logits, labels = make_rows(2, 2500 + offset, dtype)
    logits = gpu.guarded(logits, row_stride=2600)
    aligned = check(gpu, logits, labels, grad=poisoned_like(gpu, logits, row_stride=2600))
    shifted = poisoned_like(gpu, logits, row_stride=2601)
    assert torch.equal(check(gpu, logits, labels, grad=shifted), aligned)


@CHECKS
@EVERY_DTYPE
def test_first_rows_aligned_alike_and_second_ones_not(gpu: EmulatedGpu, check: Check, dtype: torch.dtype) -> None:
    logits, labels = make_rows(2, 2500, dtype)
    logits = gpu.guarded(logits, row_stride=2600, at_start=True)
    check(gpu, logits, labels, grad=poisoned_like(gpu, logits, row_stride=2601, at_start=True))


@CHECKS
@EVERY_DTYPE
@pytest.mark.parametrize("vocab, stride", [(77, 77), (2501, 2501), (2501, 2510), (16384, 16384)])
def test_in_place_gradient_is_the_same_bits(
    gpu: EmulatedGpu, check: Check, dtype: torch.dtype, vocab: int, stride: int
) -> None:
    logits, labels = make_rows(3, vocab, dtype)
    out_of_place = check(gpu, gpu.guarded(logits, row_stride=stride, at_start=True), labels)
    overwritten = gpu.guarded(logits, row_stride=stride, at_start=True)
    if check is check_sweep:
        with gpu.order(3):
            check(gpu, overwritten, labels, grad=overwritten)
    else:
        stats = gpu.row_stats(overwritten, labels, 0, vocab, INV_TEMPERATURE, True)
        log_prob, entropy, maximum, log_sum = gpu.combine_stats(stats[None])
        rest = (0, vocab, INV_TEMPERATURE, maximum, log_sum, entropy, *upstream(3))
        gpu.row_grad_(overwritten, overwritten, labels, *rest)
    assert torch.equal(overwritten, out_of_place)
    assert overwritten.as_strided((2, stride - vocab), (stride, 1), overwritten.storage_offset() + vocab).isnan().all()


@CHECKS
def test_rows_may_lie_further_apart_than_32_bits_can_tell(gpu: EmulatedGpu, check: Check) -> None:
    logits, labels = make_rows(3, 77, torch.bfloat16)
    stride = 2**30 + 3  # two of them are too many
    check(gpu, gpu.guarded(logits, row_stride=stride), labels, grad=poisoned_like(gpu, logits, row_stride=stride))


@CHECKS
@EVERY_DTYPE
def test_padding_ignored_rows_and_unlikely_tokens(gpu: EmulatedGpu, check: Check, dtype: torch.dtype) -> None:
    logits, labels = make_rows(7, 5003, dtype)
    labels = labels.clamp(max=4999)
    logits[:, 5000:] = NAN
    logits[1] = NAN
    labels[1] = -100
    logits[2, ::2] = -INF
    labels[2] = 1
    logits[3, :4096] = -INF
    labels[3] = 4500
    logits[4] = 2.5
    grad = check(gpu, gpu.guarded(logits), labels, vocab_size=5000)
    assert not grad[:, 5000:].any() and not grad[1].any() and not grad[2, ::2].any()


@CHECKS
@EVERY_DTYPE
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logits_near_ten_thousand(gpu: EmulatedGpu, check: Check, dtype: torch.dtype, offset: float) -> None:
    logits, labels = make_rows(4, 5003, torch.float32)
    check(gpu, gpu.guarded((logits + offset).to(dtype)), labels)


@EVERY_DTYPE
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("column", [0, 5, 4095, 9000])
@pytest.mark.parametrize("splits", [1, 3])
def test_nan_and_infinity_are_never_hidden(
    gpu: EmulatedGpu, dtype: torch.dtype, poison: float, column: int, splits: int
) -> None:
    logits, labels = make_rows(3, 9001, dtype)
    logits[1, column] = poison
    logits[2] = -INF
    logits[2, column] = poison
    logits = gpu.guarded(logits)
    log_prob, entropy, _, _ = gpu.combine_stats(gpu.row_stats(logits, labels, 0, 9001, 1.0, True, splits)[None])
    grad = poisoned_like(gpu, logits)
    swept = gpu.rectified_sweep_(logits, grad, labels, 9001, 1.0, torch.ones(3), torch.zeros(3))
    assert log_prob.isnan().tolist() == entropy.isnan().tolist() == swept.isnan().tolist() == [False, True, True]
    assert grad.isnan().any(-1).tolist() == [False, True, True]


def test_row_of_nothing_is_nan(gpu: EmulatedGpu) -> None:
    logits = gpu.guarded(torch.full((1, 9000), -INF))
    labels = torch.tensor([5])
    for splits in (1, 4):
        stats = gpu.row_stats(logits, labels, 0, 9000, 1.0, True, splits)
        assert gpu.combine_stats(stats[None])[0].isnan().all()
    assert gpu.rectified_sweep_(logits, logits, labels, 9000, 1.0, torch.ones(1), torch.ones(1)).isnan().all()


@pytest.mark.parametrize("label", [70, 76, 77, 2**40])
def test_label_outside_the_vocabulary_is_nan(gpu: EmulatedGpu, label: int) -> None:
    logits, _ = make_rows(2, 77, torch.float32)
    logits, labels = gpu.guarded(logits), torch.tensor([5, label])
    stats = gpu.row_stats(logits, labels, 0, 70, 1.0, False)
    assert gpu.combine_stats(stats[None])[0].isnan().tolist() == [False, True]
    log_prob = gpu.rectified_sweep_(logits, logits, labels, 70, 1.0, torch.ones(2), torch.ones(2))
    assert log_prob.isnan().tolist() == [False, True]


@pytest.mark.parametrize("used", ["log_prob", "entropy"])
def test_rows_may_have_an_upstream_gradient_of_one_kind(gpu: EmulatedGpu, used: str) -> None:
    logits, labels = make_rows(3, 2501, torch.float32)
    logits = gpu.guarded(logits)
    grad, other = upstream(3)
    other[1] = 0.0  # row 0 has both
    grad[2] = 0.0
    grads = (grad, other) if used == "log_prob" else (other, grad)
    stats = gpu.row_stats(logits, labels, 0, 2501, 1.0, True)
    _, entropy, maximum, log_sum = gpu.combine_stats(stats[None])
    actual = poisoned_like(gpu, logits)
    gpu.row_grad_(logits, actual, labels, 0, 2501, 1.0, maximum, log_sum, entropy, *grads)
    assert_promised_grad(actual, dense_answer(logits, labels, *grads).grad, logits, labels, *grads)


def test_entropy_that_nobody_asked_for_reaches_nothing(gpu: EmulatedGpu) -> None:
    logits, labels = make_rows(3, 2501, torch.float32)
    logits, zero = gpu.guarded(logits), torch.zeros(3)
    stats = gpu.row_stats(logits, labels, 0, 2501, 1.0, False)
    _, entropy, maximum, log_sum = gpu.combine_stats(stats[None])
    assert entropy.isnan().all()
    grad = poisoned_like(gpu, logits)
    gpu.row_grad_(logits, grad, labels, 0, 2501, 1.0, maximum, log_sum, entropy, upstream(3)[0], zero)
    expected = dense_answer(logits, labels, upstream(3)[0], zero).grad
    assert_promised_grad(grad, expected, logits, labels, upstream(3)[0], zero)


@CHECKS
def test_no_upstream_gradient_means_zeros_whatever_the_row_holds(gpu: EmulatedGpu, check: Check) -> None:
    logits, labels = make_rows(3, 2501, torch.bfloat16)
    logits[1] = NAN
    logits = gpu.guarded(logits)
    grad = poisoned_like(gpu, logits)
    weight = torch.tensor([1.0, 0.0, 1.0])
    if check is check_sweep:
        gpu.rectified_sweep_(logits, grad, labels, 2501, 1.0, weight, torch.ones(3))
    else:
        stats = gpu.row_stats(logits, labels, 0, 2501, 1.0, True)
        _, entropy, maximum, log_sum = gpu.combine_stats(stats[None])
        gpu.row_grad_(logits, grad, labels, 0, 2501, 1.0, maximum, log_sum, entropy, weight, weight)
    assert not grad[1].any()
    assert grad[[0, 2]].isfinite().all() and grad[[0, 2]].any()


# Few rows


@EVERY_DTYPE
@pytest.mark.parametrize("splits", [2, 3, 7, 18])
@pytest.mark.parametrize("vocab", [1, 77, 5003])
def test_split_rows_match_dense(gpu: EmulatedGpu, dtype: torch.dtype, splits: int, vocab: int) -> None:
    # More splits than a short vocabulary has use for: some blocks get nothing.
    logits, labels = make_rows(5, vocab, dtype)
    logits[1] = NAN
    labels[1] = -100
    if vocab > 77:
        logits[2, :4000] = -INF  # some blocks find nothing
        labels[2], labels[3] = 4999, 0
        logits[4, 3000] = 300.0  # the others' sums vanish
    check_two_passes(gpu, gpu.guarded(logits), labels, splits=splits)


def test_long_rows_are_split_only_where_they_are_few(gpu: EmulatedGpu) -> None:
    assert gpu.splits(1, 151936) == 9 and gpu.splits(100, 151936) == 5
    assert gpu.splits(8192, 151936) == gpu.splits(1, 32767) == gpu.splits(1, 1) == 1
    assert gpu.splits(1, 300_000) == 18 and gpu.splits(2**31, 300_000) == 1


@EVERY_DTYPE
def test_splits_of_a_later_shard(gpu: EmulatedGpu, dtype: torch.dtype) -> None:
    logits, labels = make_rows(4, 3000, dtype)
    logits = gpu.guarded(logits)
    labels = torch.tensor([-1, 999, 1000, 3999])  # ignored; of an earlier shard; the first and last of this one
    whole, split = (gpu.row_stats(logits, labels, 1000, 3000, 0.5, True, splits) for splits in (1, 4))
    torch.testing.assert_close(split, whole, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(whole, OPS.row_stats(logits, labels, 1000, 3000, 0.5, True), rtol=2e-6, atol=1e-6)


# The sweep on other GPUs: (cluster, bytes of block memory). 2 KB and 1 KB do not hold the row: it is read twice.
@EVERY_DTYPE
@pytest.mark.parametrize("cluster, memory", [(1, 163 * 1024), (1, 2048), (2, 99 * 1024), (8, 99 * 1024), (8, 1024)])
def test_sweep_on_other_gpus(gpu: EmulatedGpu, dtype: torch.dtype, cluster: int, memory: int) -> None:
    logits, labels = make_rows(4, 24001, dtype)
    labels[0], labels[1], labels[2] = 0, 24000, -100
    logits[2] = NAN
    logits = gpu.guarded(logits)
    with gpu.limits(cluster, memory):
        check_sweep(gpu, logits, labels)
        with gpu.order(5):
            check_sweep(gpu, logits, labels, grad=poisoned_like(gpu, logits, row_stride=24002))


@pytest.mark.parametrize("vocab", [151936, 300_000])
def test_sweep_of_a_long_row_takes_a_whole_cluster(gpu: EmulatedGpu, vocab: int) -> None:
    logits, labels = make_rows(1, vocab, torch.bfloat16)
    logits = gpu.guarded(logits)
    check_sweep(gpu, logits, labels, grad=logits)


# Orders


@EVERY_DTYPE
def test_order_of_blocks_and_warps_changes_no_bit(gpu: EmulatedGpu, dtype: torch.dtype) -> None:
    logits, labels = make_rows(5, 25007, dtype)
    labels[3] = -100
    values, ids = torch.randn(3000), torch.arange(3000) // 700

    def run() -> list[Tensor]:
        placed = gpu.guarded(logits)
        return [
            check_two_passes(gpu, placed, labels, splits=3),
            check_sweep(gpu, placed, labels),
            *gpu.segment_sums(values, None, ids, 5),
        ]

    first = run()
    for seed, backwards in ((0, True), (1, False), (2, True)):
        with gpu.order(seed, backwards=backwards):
            for actual, expected in zip(run(), first, strict=True):
                assert torch.equal(actual, expected)


@EVERY_DTYPE
def test_shards_agree_with_the_cpu_operators(gpu: EmulatedGpu, dtype: torch.dtype) -> None:
    logits, labels = make_rows(6, 1001, dtype)
    labels[0] = -100
    grads = upstream(6)
    parts = [(gpu.guarded(logits[:, a:b]), a, b - a) for a, b in ((0, 333), (333, 334), (334, 1001))]
    results = []
    for ops in (gpu, OPS):
        stats = torch.stack([ops.row_stats(part, labels, start, width, 1.0, True) for part, start, width in parts])
        log_prob, entropy, maximum, log_sum = ops.combine_stats(stats)
        grad = [torch.full_like(part, NAN) for part, _, _ in parts]
        for out, (part, start, width) in zip(grad, parts, strict=True):
            ops.row_grad_(part, out, labels, start, width, 1.0, maximum, log_sum, entropy, *grads)
        results.append([log_prob, entropy, torch.cat(grad, dim=1).float()])
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=2 * rounding, atol=1e-6)


def test_many_shards_merge_as_on_the_cpu(gpu: EmulatedGpu) -> None:
    stats = torch.randn(16, 300, 4).exp()
    stats[:, :, 3] = torch.where(torch.arange(16)[:, None] == torch.arange(300) % 16, 0.5, INF)
    torch.testing.assert_close(gpu.combine_stats(stats), OPS.combine_stats(stats), rtol=2e-7, atol=2e-7)
    torch.testing.assert_close(gpu.merge_stats(stats), OPS.merge_stats(stats), rtol=2e-7, atol=2e-7)


# Anything


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 4),
    width=st.integers(1, 9000),
    gaps=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    padding=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 4.0, 30.0]),
    splits=st.integers(1, 9),
    device=st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(2048, 40_000)),
    order=st.tuples(st.integers(0, 3), st.booleans()),
    at_start=st.booleans(),
    inplace=st.booleans(),
)
def test_anything_matches_dense(
    gpu: EmulatedGpu,
    n: int,
    width: int,
    gaps: tuple[int, int],
    padding: int,
    dtype: torch.dtype,
    scale: float,
    splits: int,
    device: tuple[int, int],
    order: tuple[int, bool],
    at_start: bool,
    inplace: bool,
) -> None:
    logits, labels = make_rows(n, width, dtype, scale)
    vocab = max(width - padding, 1)
    logits[:, vocab:] = NAN
    labels = labels.clamp(max=vocab - 1)
    labels[-1] = -100 if n > 2 else labels[-1]
    logits = gpu.guarded(logits, row_stride=width + gaps[0], at_start=at_start)
    with gpu.order(order[0], backwards=order[1]), gpu.limits(*device):
        check_two_passes(gpu, logits, labels, splits=splits, vocab_size=vocab)
        grad = logits if inplace else poisoned_like(gpu, logits, row_stride=width + gaps[1], at_start=at_start)
        check_sweep(gpu, logits, labels, grad=grad, vocab_size=vocab)


# Segments and groups


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("lengths", [[1], [0, 5, 0, 300, 1, 4096, 0], [9000], [0, 0], [2] * 70])
def test_segment_sums(gpu: EmulatedGpu, lengths: list[int], with_mask: bool) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    ids = torch.cat([torch.full((3,), -1), ids, torch.full((300,), len(lengths))])  # belong to no segment
    values = torch.randn(len(ids), generator=generator) * 1e3
    mask = torch.rand(len(ids), generator=generator) < 0.6 if with_mask else None
    values[:3] = values[-300:] = NAN
    if with_mask:
        values[~mask] = NAN
    sums, counts = gpu.segment_sums(values, mask, ids, len(lengths))
    for segment in range(len(lengths)):
        live = (ids == segment) if mask is None else (ids == segment) & mask
        assert counts[segment] == live.sum()
        expected = values[live].double().sum()
        torch.testing.assert_close(sums[segment].double(), expected, rtol=1e-7, atol=1e-9)
    actual = OPS.segment_sums(values, mask, ids, len(lengths))
    torch.testing.assert_close((sums, counts), actual, rtol=2e-7, atol=1e-9)


def test_a_nan_that_counts_reaches_the_sum(gpu: EmulatedGpu) -> None:
    sums, counts = gpu.segment_sums(torch.tensor([1.0, NAN, 2.0]), None, torch.tensor([0, 1, 2]), 3)
    assert sums.isnan().tolist() == [False, True, False] and counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
def test_group_advantages(gpu: EmulatedGpu, divide: bool, ddof: int) -> None:
    generator = torch.Generator().manual_seed(7)
    sizes = torch.tensor([1, 2, 8, 130, 5, 1, 64])
    ids = torch.tensor([-(2**63), -7, 0, 3, 9, 10, 2**63 - 1]).repeat_interleave(sizes)
    rewards = torch.randn(int(sizes.sum()), generator=generator, dtype=torch.float64)
    rewards[ids == 9] = 0.1  # its mean over 5 is off by an ulp
    actual = gpu.group_advantages(rewards, ids, divide, ddof, 1e-6)
    for group in ids.unique():
        of = rewards[ids == group]
        expected = of - of.mean()
        if divide and len(of) > 1:
            expected = expected / (of.std(correction=ddof) + 1e-6)
        expected = of if len(of) == 1 else torch.zeros(5) if group == 9 else expected
        torch.testing.assert_close(actual[ids == group], expected.float(), rtol=2e-6, atol=1e-7)
    assert not actual[ids == 9].any()
    torch.testing.assert_close(actual, OPS.group_advantages(rewards, ids, divide, ddof, 1e-6), rtol=2e-7, atol=1e-9)


# The emulation itself


@pytest.mark.parametrize(
    "which, message",
    [
        (0, "80 at a barrier and 0 at the cluster's, 48 have ended"),
        (1, "64 threads wait in a shuffle"),
        (2, "lanes meet in different shuffles"),
        (3, "64 at the cluster's, 64 have ended"),
        (4, "which is not aligned"),
        (5, "outside of every buffer"),
    ],
)
def test_emulation_refuses_faulty_kernels(gpu: EmulatedGpu, which: int, message: str) -> None:
    for seed in (0, 1):
        with gpu.order(seed), pytest.raises(RuntimeError, match=message):
            gpu.run_faulty_kernel(which)


@pytest.mark.parametrize("which", [6, 7])
def test_block_memory_is_nan_before_and_after(gpu: EmulatedGpu, which: int) -> None:
    assert gpu.run_faulty_kernel(which) != gpu.run_faulty_kernel(which)


def test_emulation_refuses_what_is_outside_of_a_tensor_or_a_gpu(gpu: EmulatedGpu) -> None:
    logits, labels = make_rows(2, 2501, torch.float32)
    logits = gpu.guarded(logits)
    with pytest.raises(RuntimeError, match="outside of every buffer"):
        gpu.row_stats(logits, labels, 0, 2502, 1.0, False)  # one column more than there is
    with gpu.limits(1, 100), pytest.raises(RuntimeError, match="a GPU refuses"):
        gpu.row_stats(logits, labels, 0, 2501, 1.0, False)
    check_two_passes(gpu, logits, labels)  # it goes on afterwards
