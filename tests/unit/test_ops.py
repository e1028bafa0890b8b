"""The operators on one shard, and on several shards of one process, against dense float64.

Vocabularies: 1 and 7 are shorter than any vector, 77 and 1000 leave a tail, 50257 is odd (every row starts at another
alignment), 151936 spans many cache blocks.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from logits_rows import make_rows, upstream
from oracle import assert_grad_close, dense_answer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gft_megatron import vocab_parallel_log_probs
from gft_megatron.ops import build_info, library, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = torch.ops.gft_megatron
INF, NAN = float("inf"), float("nan")
TEMPERATURE = 0.7


def check_against_dense(logits: Tensor, labels: Tensor, **options) -> Tensor:
    """Compare values and gradients of one call; return the gradient."""
    options = {"temperature": TEMPERATURE, "vocab_size": None} | options
    grads = upstream(len(labels))
    expected = dense_answer(logits, labels, *grads, **options)
    leaf = logits.detach().requires_grad_()
    log_probs, entropy = vocab_parallel_log_probs(leaf, labels, with_entropy=True, **options)
    assert log_probs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected.log_probs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=1e-6, atol=5e-6)
    torch.autograd.backward([log_probs, entropy], grads)
    assert_grad_close(leaf.grad, expected.grad)
    return leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, vocab", [(5, 1), (5, 7), (5, 77), (5, 512), (5, 1000), (3, 50257), (2, 151936), (1, 1000)])
def test_matches_dense(n: int, vocab: int, dtype: torch.dtype) -> None:
    check_against_dense(*make_rows(n, vocab, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_dense_where_rows_are_not_dense(dtype: torch.dtype) -> None:
    wide, labels = make_rows(5, 1003, dtype)
    check_against_dense(wide[:, 1:1002], labels.clamp(max=1000))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_dense_with_padded_vocabulary(dtype: torch.dtype) -> None:
    logits, labels = make_rows(5, 1000, dtype)
    logits[:, 990:] = NAN  # absent: not even read
    grad = check_against_dense(logits, labels.clamp(max=989), vocab_size=990)
    assert not grad[:, 990:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_dense_with_infinitely_unlikely_tokens(dtype: torch.dtype) -> None:
    logits, labels = make_rows(4, 9000, dtype)
    logits[0, ::2] = -INF
    logits[1, :8000] = -INF  # a whole cache block of nothing comes first
    logits[2, 10:] = -INF
    grad = check_against_dense(logits, torch.tensor([1, 8500, 9, int(labels[3])]))
    assert not grad[0, ::2].any()


def test_label_with_probability_zero_has_log_prob_minus_infinity() -> None:
    logits, _ = make_rows(1, 77, torch.float32)
    logits[0, 5] = -INF
    log_probs, _ = vocab_parallel_log_probs(logits, torch.tensor([5]))
    assert log_probs.tolist() == [-INF]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -3.5, 1e4])
def test_matches_dense_on_uniform_rows(dtype: torch.dtype, value: float) -> None:
    check_against_dense(torch.full((3, 1000), value, dtype=dtype), torch.tensor([0, 500, 999]))


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_dense_on_logits_near_ten_thousand(dtype: torch.dtype, offset: float) -> None:
    logits, labels = make_rows(6, 1000, torch.float32)
    labels[:3] = logits[:3].argmax(-1)
    check_against_dense((logits + offset).to(dtype), labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_are_zero_and_their_nan_reaches_nothing(dtype: torch.dtype) -> None:
    logits, labels = make_rows(5, 1000, dtype)
    logits[1] = NAN
    logits[3, 7] = INF
    labels[[1, 3]] = -100
    grad = check_against_dense(logits, labels)
    assert not grad[[1, 3]].any()


def test_all_rows_ignored() -> None:
    logits, labels = make_rows(3, 77, torch.float32)
    grad = check_against_dense(torch.full_like(logits, NAN), torch.full_like(labels, -100))
    assert not grad.any()


def test_no_rows() -> None:
    logits = torch.zeros(0, 77, requires_grad=True)
    log_probs, entropy = vocab_parallel_log_probs(logits, torch.zeros(0, dtype=torch.int64), with_entropy=True)
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == entropy.shape == (0,)
    assert logits.grad.shape == (0, 77)


def test_any_id_may_be_the_ignored_one() -> None:
    logits, labels = make_rows(6, 77, torch.float32)
    labels[[0, 4]] = 3
    actual, _ = vocab_parallel_log_probs(logits, labels, ignore_index=3)
    expected, _ = vocab_parallel_log_probs(logits, labels.where(labels != 3, -100))
    assert torch.equal(actual, expected)
    assert not actual[[0, 4]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("column", [0, 5, 4095, 4096, 8999])
def test_nan_and_infinity_are_never_hidden(dtype: torch.dtype, poison: float, column: int) -> None:
    logits, labels = make_rows(3, 9000, dtype)
    logits[1, column] = poison
    labels[1] = 17
    logits[2, :] = -INF
    logits[2, column] = poison
    log_probs, entropy = vocab_parallel_log_probs(logits, labels, with_entropy=True, temperature=TEMPERATURE)
    assert log_probs.isnan().tolist() == entropy.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800FF8])
@pytest.mark.parametrize("column", [5, 255])
def test_nan_of_any_bits_is_never_hidden(bits: int, column: int) -> None:
    """Memory that was never written: exponentials that are put together from bits must not make numbers of it."""
    logits, labels = make_rows(2, 256 + 40, torch.float32)
    logits.view(torch.int32)[1, column] = bits
    labels[1] = 17
    logits.requires_grad_()
    log_probs, entropy = vocab_parallel_log_probs(logits, labels, with_entropy=True)
    assert log_probs.isnan().tolist() == entropy.isnan().tolist() == [False, True]
    torch.autograd.backward([log_probs, entropy], [torch.ones(2), torch.ones(2)])
    assert logits.grad.isnan().any(-1).tolist() == [False, True]


def test_row_of_nothing_is_nan() -> None:
    log_probs, _ = vocab_parallel_log_probs(torch.full((1, 77), -INF), torch.tensor([5]))
    assert log_probs.isnan().all()


def test_rows_without_upstream_gradient_get_none_whatever_they_hold() -> None:
    logits, labels = make_rows(3, 77, torch.float32)
    logits[1] = NAN
    leaf = logits.requires_grad_()
    log_probs, _ = vocab_parallel_log_probs(leaf, labels)
    log_probs.backward(torch.tensor([1.0, 0.0, 1.0]))
    assert not leaf.grad[1].any()
    assert leaf.grad[[0, 2]].isfinite().all() and leaf.grad[[0, 2]].any()


# The splits are uneven and one shard is empty of valid columns: the operators do not need equal shards.
@pytest.mark.parametrize("edges", [[0, 1000], [0, 500, 1000], [0, 1, 7, 990, 1000]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_of_any_width_match_dense(dtype: torch.dtype, edges: list[int]) -> None:
    vocab = 990
    logits, labels = make_rows(8, 1000, dtype)
    labels = labels.clamp(max=vocab - 1)
    labels[2] = -100
    logits[2] = NAN
    grads = upstream(8)
    expected = dense_answer(logits, labels, *grads, temperature=TEMPERATURE, vocab_size=vocab)
    shards = list(zip(edges, edges[1:], strict=False))
    places = [(start, min(max(vocab - start, 0), end - start), 1 / TEMPERATURE) for start, end in shards]
    parts = [logits[:, start:end] for start, end in shards]
    stats = torch.stack([OPS.row_stats(part, labels, *place, True) for part, place in zip(parts, places, strict=True)])
    log_probs, entropy, maximum, log_sum = OPS.combine_stats(stats)
    torch.testing.assert_close(log_probs.double(), expected.log_probs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=1e-6, atol=5e-6)
    grad = torch.full_like(logits, NAN)
    for part, place, (start, end) in zip(parts, places, shards, strict=True):
        OPS.row_grad_(part, grad[:, start:end], labels, *place, maximum, log_sum, entropy, *grads)
    assert_grad_close(grad, expected.grad)


@pytest.mark.parametrize("edges", [[0, 1000], [0, 500, 1000], [0, 1, 7, 990, 1000]])
def test_parts_merge_into_the_whole(edges: list[int]) -> None:
    """Also a part with nothing to say, one with nothing but -inf, NaN, and a label of another shard."""
    logits, _ = make_rows(6, 1000, torch.float32)
    logits[1, :7] = logits[2] = -INF
    logits[3, 600] = NAN
    labels = torch.tensor([-100, 0, 500, 989, 999, 1300])
    parts = [
        OPS.row_stats(logits[:, a:b], labels, a, min(b, 990) - a if a < 990 else 0, 1 / TEMPERATURE, True)
        for a, b in zip(edges, edges[1:], strict=False)
    ]
    merged, whole = OPS.merge_stats(torch.stack(parts)), OPS.row_stats(logits, labels, 0, 990, 1 / TEMPERATURE, True)
    assert torch.equal(merged[:, 0], whole[:, 0])
    torch.testing.assert_close(merged, whole, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert merged[4:, 3].tolist() == [INF, INF]  # padding, and another shard: still nobody's


def test_label_that_no_shard_owns_is_nan() -> None:
    logits, _ = make_rows(2, 77, torch.float32)
    stats = OPS.row_stats(logits, torch.tensor([5, 77]), 0, 77, 1.0, False)
    assert OPS.combine_stats(stats[None])[0].isnan().tolist() == [False, True]


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits [2, 3, 77] whose rows lie in memory in every way that models and slices produce."""
    whole, _ = make_rows(8, 79, dtype)
    stacked = whole.view(2, 4, 79)
    return {
        "dense": stacked[:, :3, :77].contiguous(),
        "shifted": stacked[:, :-1, :77],
        "sequence first": whole.view(4, 2, 79)[:3, :, 2:].transpose(0, 1),
        "expanded": stacked[:1, :3, :77].expand(2, 3, 77),
    }


@pytest.mark.parametrize("layout", ["dense", "shifted", "sequence first", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_of_the_leading_dimensions_changes_nothing(dtype: torch.dtype, layout: str) -> None:
    logits = layouts(dtype)[layout]
    labels = torch.randint(77, (2, 3), generator=torch.Generator().manual_seed(0))

    def run(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        log_probs, entropy = vocab_parallel_log_probs(leaf, labels, with_entropy=True)
        (log_probs * 2 + entropy).sum().backward()
        return log_probs, entropy, leaf.grad

    for actual, expected in zip(run(logits), run(logits.contiguous()), strict=True):
        assert actual.shape[:2] == (2, 3)
        assert torch.equal(actual, expected)


def test_columns_that_are_not_adjacent() -> None:
    logits, labels = make_rows(5, 77, torch.float32)
    check_against_dense(logits.t().contiguous().t(), labels)
    with pytest.raises(ValueError, match="inplace_backward needs adjacent logits"):
        vocab_parallel_log_probs(logits.t().contiguous().t(), labels, inplace_backward=True)


class LargestAllocation(TorchDispatchMode):
    """Remembers the size of the largest new tensor."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("layout", ["dense", "shifted", "sequence first"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gradient_is_the_same_bits_and_costs_no_memory(dtype: torch.dtype, layout: str) -> None:
    labels = torch.randint(77, (2, 3), generator=torch.Generator().manual_seed(0))
    grads = []
    for inplace in (False, True):
        logits = layouts(dtype)[layout].detach().requires_grad_()
        output = logits.mul(1.0)  # what a model returns: not a leaf, and in the layout of its input
        seen = []
        output.register_hook(seen.append)
        with LargestAllocation() as largest:
            log_probs, entropy = vocab_parallel_log_probs(output, labels, with_entropy=True, inplace_backward=inplace)
        loss = (log_probs * 2 + entropy).sum()
        loss.backward()
        assert largest.num_bytes <= 6 * 16  # [n, 4] fp32
        assert (seen[0].data_ptr() == output.data_ptr()) is inplace
        grads.append(logits.grad)
    assert torch.equal(*grads)


def test_second_backward_through_overwritten_logits_is_refused() -> None:
    logits, labels = make_rows(3, 77, torch.float32)
    output = logits.requires_grad_() * 1
    log_probs, _ = vocab_parallel_log_probs(output, labels, inplace_backward=True)
    log_probs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwritten by their gradient"):
        log_probs.sum().backward()


def test_another_user_of_overwritten_logits_is_told() -> None:
    logits, labels = make_rows(3, 77, torch.float32)
    output = logits.requires_grad_() * 1
    square = output.square().sum()  # saves the logits
    log_probs, _ = vocab_parallel_log_probs(output, labels, inplace_backward=True)
    log_probs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_second_backward_out_of_place_gives_the_same_gradient() -> None:
    logits, labels = make_rows(3, 77, torch.float32)
    logits.requires_grad_()
    log_probs, _ = vocab_parallel_log_probs(logits, labels)
    first, second = (torch.autograd.grad(log_probs.sum(), logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("used", ["log_probs", "entropy"])
def test_output_without_gradient_contributes_none(used: str) -> None:
    logits, labels = make_rows(5, 1000, torch.float32)
    grad, zero = upstream(5)[0], torch.zeros(5)
    weights = (grad, zero) if used == "log_probs" else (zero, grad)
    expected = dense_answer(logits, labels, *weights)
    logits.requires_grad_()
    outputs = dict(
        zip(("log_probs", "entropy"), vocab_parallel_log_probs(logits, labels, with_entropy=True), strict=True)
    )
    outputs[used].backward(grad)
    assert_grad_close(logits.grad, expected.grad)


def test_autocast_changes_nothing() -> None:
    logits, labels = make_rows(5, 1000, torch.float32)
    expected = check_against_dense(logits, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(check_against_dense(logits, labels), expected)


def test_number_of_threads_changes_nothing() -> None:
    logits, labels = make_rows(64, 5000, torch.float32)
    grads = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            grads.append(check_against_dense(logits, labels))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.tensor([0, 77, 2])}, r"label 77 is outside the vocabulary \[0, 77\)"),
        ({"labels": torch.tensor([0, -1, 2])}, r"label -1 is outside the vocabulary \[0, 77\)"),
        ({"labels": torch.tensor([0, 76, 2]), "vocab_size": 76}, r"label 76 is outside the vocabulary \[0, 76\)"),
        (
            {"labels": torch.tensor([0, 1, 2], dtype=torch.int32)},
            r"labels must be int64 \(3,\) on cpu, got torch.int32",
        ),
        ({"labels": torch.tensor([0, 1])}, r"labels must be int64 \(3,\) on cpu, got torch.int64 \(2,\)"),
        ({"logits": torch.zeros(3, 77, dtype=torch.float64)}, "logits must be float32, bfloat16 or float16"),
        ({"logits": torch.zeros(3, 0)}, "logits must be"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": INF}, "temperature must be positive and finite, got inf"),
        ({"vocab_size": 78}, r"vocab_size must be in \[1, 77\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(3, 77), "labels": torch.tensor([0, 1, 2])} | change
    with pytest.raises(ValueError, match=message):
        vocab_parallel_log_probs(**arguments)


def op_arguments(dtype: torch.dtype) -> dict[str, tuple]:
    logits, _ = make_rows(6, 1000, dtype)
    logits[1, ::3] = -INF
    labels = torch.tensor([-100, 299, 300, 650, 0, 689])  # ignored, in the other shard, first and last of this one
    part, place = logits[:, 300:700], (300, 390, 1 / TEMPERATURE)
    first = reference.row_stats(logits[:, :300], labels, 0, 300, 1 / TEMPERATURE, True)
    stats = torch.stack([first, reference.row_stats(part, labels, *place, True)])
    _, entropy, maximum, log_sum = reference.combine_stats(stats)
    grads = upstream(6)
    return {
        "row_stats": (part, labels, *place, True),
        "merge_stats": (stats,),
        "combine_stats": (stats,),
        "row_grad_": (part, torch.empty_like(part), labels, *place, maximum, log_sum, entropy, *grads),
    }


@pytest.mark.parametrize("name", ["row_stats", "merge_stats", "combine_stats", "row_grad_"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_agrees_operator_by_operator(dtype: torch.dtype, name: str) -> None:
    arguments = op_arguments(dtype)[name]
    actual, expected = getattr(OPS, name)(*arguments), getattr(reference, name)
    if name == "row_grad_":
        actual = arguments[1].clone()
        expected(*arguments)
        assert_grad_close(actual, arguments[1].double())
    else:
        torch.testing.assert_close(actual, expected(*arguments), rtol=2e-6, atol=2e-6, equal_nan=True)


def test_reference_agrees_where_no_entropy_was_asked_for() -> None:
    # As torch.compile may pass it on: the entropy is NaN, and its gradient zeros.
    logits, labels = make_rows(3, 77, torch.float32)
    grads = []
    for ops in (OPS, reference):
        _, entropy, maximum, log_sum = ops.combine_stats(ops.row_stats(logits, labels, 0, 77, 1.0, False)[None])
        assert entropy.isnan().all()
        grads.append(torch.full_like(logits, NAN))
        ops.row_grad_(logits, grads[-1], labels, 0, 77, 1.0, maximum, log_sum, entropy, upstream(3)[0], torch.zeros(3))
    assert_grad_close(grads[0], grads[1].double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_mode_matches_dense(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setenv("GFT_MEGATRON_REFERENCE", "1")
    assert library.row_ops(torch.device("cpu")) is reference
    logits, labels = make_rows(5, 1000, dtype)
    logits[1, ::2] = -INF
    labels[:2] = torch.tensor([-100, 1])
    check_against_dense(logits, labels.clamp(max=989), vocab_size=990)


ISAS = ["baseline", "avx2", "avx512", "avx512_bf16"]


@pytest.mark.skipif(build_info()["isa"] not in ISAS, reason="no choice of instruction sets on this machine")
@pytest.mark.parametrize("isa", ISAS[: ISAS.index(build_info()["isa"])] if build_info()["isa"] in ISAS else [])
def test_narrower_instruction_sets(isa: str) -> None:
    environment = os.environ | {"GFT_MEGATRON_ISA": isa}
    python = [sys.executable, "-c", "from gft_megatron.ops import build_info; print(build_info()['isa'])"]
    assert subprocess.run(python, env=environment, capture_output=True, text=True).stdout.strip() == isa
    select = ["-k", "matches_dense or any_width or never_hidden or reference_agrees or rounded_once"]
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in ("test_ops_rounding.py", "test_kl.py"))]
    pytest_again = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *select]
    result = subprocess.run(pytest_again, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
