"""vocab_parallel_kl on one shard, and its operators on several shards of one process, against dense float64."""

import pytest
import torch
from logits_rows import make_rows, upstream
from oracle import assert_kl_grad_close, dense_kl
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gft_megatron import vocab_parallel_kl
from gft_megatron.ops import kl as kl_module
from gft_megatron.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = torch.ops.gft_megatron
INF, NAN = float("inf"), float("nan")
TEMPERATURE = 0.7


def make_pair(n: int, vocab: int, dtype: torch.dtype, distance: float = 1.0) -> tuple[Tensor, Tensor]:
    """Policy and reference [n, vocab] that differ by `distance` a logit."""
    logits, _ = make_rows(n, vocab, torch.float32)
    noise = torch.randn(n, vocab, generator=torch.Generator().manual_seed(7))
    return logits.to(dtype), (logits + distance * noise).to(dtype)


def check_against_dense(logits: Tensor, ref_logits: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Compare value and gradient of one call; return both."""
    options = {"temperature": TEMPERATURE} | options
    grad_kl = upstream(len(logits))[0]
    expected = dense_kl(logits, ref_logits, grad_kl, **options)
    leaf = logits.detach().requires_grad_()
    kl = vocab_parallel_kl(leaf, ref_logits, **options)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), expected.kl, rtol=1e-6, atol=1e-6)
    kl.backward(grad_kl)
    assert_kl_grad_close(leaf.grad, expected.grad, expected.size)
    return kl.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, vocab", [(5, 1), (5, 7), (5, 77), (5, 512), (3, 9001), (2, 151936), (1, 1000)])
def test_matches_dense(n: int, vocab: int, dtype: torch.dtype) -> None:
    check_against_dense(*make_pair(n, vocab, dtype))


@pytest.mark.parametrize("distance", [0.0, 1e-3, 0.03, 20.0])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_matches_dense_from_equal_to_far_apart(distance: float, temperature: float) -> None:
    check_against_dense(*make_pair(4, 3001, torch.float32, distance), temperature=temperature)


def test_matches_dense_where_both_are_nearly_equal() -> None:
    """The KL of a policy that has hardly moved: what is left of it has to be more than rounding."""
    logits, ref_logits = make_pair(16, 32000, torch.float32, 1e-3)
    expected = dense_kl(logits, ref_logits, torch.ones(16)).kl
    kl = vocab_parallel_kl(logits, ref_logits).double()
    assert expected.max() < 1e-6
    torch.testing.assert_close(kl, expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("temperature, gap", [(3.0, 8.0), (7.0, 64.0)])
def test_matches_dense_where_logits_take_few_values(temperature: float, gap: float) -> None:
    """As 16-bit logits near 1e4 do: every addition to a sum may then be rounded in the same direction."""
    rare = torch.rand(2, 8192, generator=torch.Generator().manual_seed(1)) < 0.001
    check_against_dense(torch.where(rare, 0.0, -gap), torch.zeros(2, 8192), temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_give_exactly_zero_and_no_gradient(dtype: torch.dtype) -> None:
    logits, _ = make_rows(6, 5003, dtype)
    logits[1, ::3] = -INF
    kl, grad = check_against_dense(logits, logits.clone())
    assert not kl.any() and not grad.any()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_dense_on_logits_near_ten_thousand(dtype: torch.dtype, offset: float) -> None:
    logits, ref_logits = make_pair(6, 1000, torch.float32)
    check_against_dense((logits + offset).to(dtype), (ref_logits + offset).to(dtype))
    check_against_dense((logits + offset).to(dtype), (ref_logits - offset).to(dtype))


def test_matches_dense_where_the_two_prefer_different_tokens() -> None:
    logits, ref_logits = make_pair(4, 2000, torch.float32)
    logits[0, 1500] = ref_logits[1, 40] = logits[2, 3] = ref_logits[2, 1999] = 1e3
    logits[3, 700] = 1e4
    kl, _ = check_against_dense(logits, ref_logits)
    assert kl[0] > 1000 and kl[2] > 1000


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_dense_with_infinitely_unlikely_tokens(dtype: torch.dtype) -> None:
    logits, ref_logits = make_pair(6, 9000, dtype)
    ref_logits[0, ::2] = -INF
    logits[1, ::3] = ref_logits[1, ::3] = -INF
    ref_logits[2, :8000] = -INF  # whole cache blocks of nothing come first
    logits[3, :8000] = ref_logits[3, :8000] = -INF
    logits[4, 17] = -INF  # the policy excludes what the reference does not
    logits[5, :8000] = -INF
    kl, grad = check_against_dense(logits, ref_logits)
    assert kl.isinf().tolist() == [False] * 4 + [True] * 2
    assert not grad[1, ::3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_dense_with_padded_vocabulary(dtype: torch.dtype) -> None:
    logits, ref_logits = make_pair(5, 1000, dtype)
    logits[:, 990:], ref_logits[:, 990:] = NAN, INF
    _, grad = check_against_dense(logits, ref_logits, vocab_size=990)
    assert not grad[:, 990:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_dense_where_ignored_rows_hold_nan(dtype: torch.dtype) -> None:
    logits, ref_logits = make_pair(5, 1000, dtype)
    labels = torch.tensor([3, -100, 999, -100, 0])
    logits[1], ref_logits[3, 5] = NAN, INF
    kl, grad = check_against_dense(logits, ref_logits, labels=labels)
    assert not kl[[1, 3]].any() and not grad[[1, 3]].any()


def test_any_id_may_be_the_ignored_one_and_all_rows_may_be_ignored() -> None:
    logits, ref_logits = make_pair(4, 77, torch.float32)
    labels = torch.tensor([3, 5, 3, 7])
    kl = vocab_parallel_kl(logits, ref_logits, labels=labels, ignore_index=3)
    assert torch.equal(kl, vocab_parallel_kl(logits, ref_logits).where(labels != 3, 0.0))
    kl, grad = check_against_dense(torch.full_like(logits, NAN), ref_logits, labels=torch.full((4,), -100))
    assert not kl.any() and not grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("column", [0, 4095, 8999])
def test_nan_and_infinity_are_never_hidden(dtype: torch.dtype, poison: float, column: int) -> None:
    logits, ref_logits = make_pair(5, 9000, dtype)
    logits[1, column] = ref_logits[2, column] = poison
    logits[3] = -INF
    ref_logits[4] = -INF
    kl = vocab_parallel_kl(logits, ref_logits, temperature=TEMPERATURE)
    assert kl.isnan().tolist() == [False] + [True] * 4


def test_rows_without_upstream_gradient_get_none_whatever_they_hold() -> None:
    logits, ref_logits = make_pair(3, 77, torch.float32)
    logits[1] = NAN
    leaf = logits.requires_grad_()
    vocab_parallel_kl(leaf, ref_logits).backward(torch.tensor([1.0, 0.0, 1.0]))
    assert not leaf.grad[1].any()
    assert leaf.grad[[0, 2]].isfinite().all() and leaf.grad[[0, 2]].any()


def test_the_reference_is_a_constant() -> None:
    logits, ref_logits = (x.requires_grad_() for x in make_pair(3, 77, torch.float32))
    vocab_parallel_kl(logits, ref_logits).sum().backward()
    assert ref_logits.grad is None and logits.grad.any()
    assert not vocab_parallel_kl(logits.detach(), ref_logits).requires_grad


# One shard, two, and four of uneven widths of which the last holds nothing but padding.
@pytest.mark.parametrize("edges", [[0, 1000], [0, 500, 1000], [0, 1, 7, 990, 1000]])
@pytest.mark.parametrize("ops", [OPS, reference], ids=["compiled", "reference"])
def test_shards_of_any_width_match_dense(ops, edges: list[int]) -> None:
    vocab = 990
    logits, ref_logits = make_pair(8, 1000, torch.float32)
    labels = torch.tensor([0, 5, -100, 3, 3, 3, 3, 3])
    logits[2] = NAN
    logits[3, 0] = 1e4  # one shard has all of the policy
    logits[4, :600] = ref_logits[4, :600] = -INF
    logits[5, :7] = -INF
    logits[6] -= 1e4  # far below the 0 that an empty shard counts from
    ref_logits[6] -= 1e4
    logits[7, :7] = -INF  # excluded, and nothing beside the rest of the reference
    ref_logits[7, :7] -= 1e4
    grad_kl = upstream(8)[0]
    expected = dense_kl(logits, ref_logits, grad_kl, labels=labels, temperature=TEMPERATURE, vocab_size=vocab)
    shards = [(slice(a, b), min(max(vocab - a, 0), b - a)) for a, b in zip(edges, edges[1:], strict=False)]
    stats = [ops.kl_stats(logits[:, c], ref_logits[:, c], labels, valid, 1 / TEMPERATURE) for c, valid in shards]
    kl, *vectors = kl_module._combine(torch.stack(stats))
    torch.testing.assert_close(kl.double(), expected.kl, rtol=1e-6, atol=1e-6)
    grad = torch.full_like(logits, NAN)
    for c, valid in shards:
        ops.kl_grad_(logits[:, c], ref_logits[:, c], grad[:, c], labels, valid, 1 / TEMPERATURE, *vectors, grad_kl)
    assert_kl_grad_close(grad, expected.grad, expected.size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_mode_matches_dense(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setenv("GFT_MEGATRON_REFERENCE", "1")
    monkeypatch.setattr(reference, "_kl_block", lambda logits: 2)  # three blocks, the last a row short
    logits, ref_logits = make_pair(5, 1001, dtype)
    logits[1, ::2] = ref_logits[1, ::2] = -INF
    logits[2, 0] = NAN
    check_against_dense(logits, ref_logits, labels=torch.tensor([1, 2, -100, 3, 4]), vocab_size=990)


def test_layouts_of_the_rows_do_not_matter() -> None:
    """Shifted, sequence first, columns that are not adjacent, and the two tensors in different layouts."""
    logits, ref_logits = (x.view(3, 4, 77) for x in make_pair(12, 77, torch.float32))
    grad_kl = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    grads = []
    for layout in (
        lambda x: x.contiguous(),
        lambda x: x,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        leaf = layout(logits[:, :-1]).detach().requires_grad_()
        kl = vocab_parallel_kl(leaf, ref_logits[:, 1:])
        kl.backward(grad_kl)
        grads.append((kl.detach(), leaf.grad))
    expected = dense_kl(logits[:, :-1].reshape(9, 77), ref_logits[:, 1:].reshape(9, 77), grad_kl.reshape(9))
    torch.testing.assert_close(grads[0][0].double().view(9), expected.kl, rtol=1e-6, atol=1e-6)
    assert_kl_grad_close(grads[0][1].view(9, 77), expected.grad, expected.size)
    for kl, grad in grads[1:]:
        assert torch.equal(kl, grads[0][0]) and torch.equal(grad, grads[0][1])


def test_one_row_and_no_row() -> None:
    logits, ref_logits = make_pair(1, 77, torch.float32)
    assert torch.equal(vocab_parallel_kl(logits[0], ref_logits[0]), vocab_parallel_kl(logits, ref_logits)[0])
    leaf = torch.zeros(0, 77, requires_grad=True)
    vocab_parallel_kl(leaf, torch.zeros(0, 77)).sum().backward()
    assert leaf.grad.shape == (0, 77)


def test_gradient_is_the_slope_of_the_value() -> None:
    """Not of the oracle: central differences of the operator itself, along random directions."""
    logits, ref_logits = make_pair(3, 50, torch.float32)
    grad_kl = upstream(3)[0]
    leaf = logits.clone().requires_grad_()
    vocab_parallel_kl(leaf, ref_logits, temperature=TEMPERATURE).backward(grad_kl)
    for seed in range(4):
        step = 1e-2 * torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
        up, down = (vocab_parallel_kl(logits + s, ref_logits, temperature=TEMPERATURE) for s in (step, -step))
        slope = ((up - down) * grad_kl).double().sum() / 2
        torch.testing.assert_close(slope, (leaf.grad.double() * step).sum(), rtol=1e-3, atol=2e-6)


def test_autocast_recompute_and_a_second_backward_change_nothing() -> None:
    logits, ref_logits = make_pair(5, 1000, torch.float32)
    _, expected = check_against_dense(logits, ref_logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(check_against_dense(logits, ref_logits)[1], expected)
    leaf = logits.clone().requires_grad_()
    kl = checkpoint(vocab_parallel_kl, leaf, ref_logits, use_reentrant=False, temperature=TEMPERATURE)
    again = vocab_parallel_kl(leaf, ref_logits, temperature=TEMPERATURE)
    for output in (kl, again, again):
        (grad,) = torch.autograd.grad(output, leaf, upstream(5)[0], retain_graph=True)
        assert torch.equal(grad, expected)


def test_compiled_equals_eager() -> None:
    def fn(logits: Tensor, ref_logits: Tensor) -> Tensor:
        return vocab_parallel_kl(logits, ref_logits, temperature=TEMPERATURE).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, vocab in ((9, 77), (5, 333)):
        logits, ref_logits = make_pair(n, vocab, torch.float32)
        grads = []
        for function in (fn, compiled):
            leaf = logits.clone().requires_grad_()
            function(leaf * 1, ref_logits).backward()
            grads.append(leaf.grad)
        assert grads[0].any()
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ref_logits": torch.zeros(3, 76)}, r"ref_logits must be as logits, torch.float32 \(3, 77\) on cpu, got"),
        ({"ref_logits": torch.zeros(3, 77).bfloat16()}, "got torch.bfloat16"),
        ({"labels": torch.tensor([0, 1])}, r"labels must be int64 \(3,\) on cpu, got torch.int64 \(2,\)"),
        ({"labels": torch.tensor([0, 77, 1])}, r"label 77 is outside the vocabulary \[0, 77\)"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"vocab_size": 78}, r"vocab_size must be in \[1, 77\]"),
        ({"logits": torch.zeros(3, 77).double(), "ref_logits": torch.zeros(3, 77).double()}, "logits must be float32"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(3, 77), "ref_logits": torch.zeros(3, 77)} | change
    with pytest.raises(ValueError, match=message):
        vocab_parallel_kl(**arguments)
