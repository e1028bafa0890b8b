"""linear_log_probs and linear_loss on one shard against autograd in float64 through hidden @ weight.T."""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gft_megatron import LOSSES, LossInputs, linear_log_probs, linear_loss
from gft_megatron.ops import linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURE = 0.7
# One rounding of the logits (bf16, fp16), of their gradient and of the products; sizes of a few units.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@dataclasses.dataclass
class Case:
    hidden: Tensor  # [n, H]
    weight: Tensor  # [v, H]
    labels: Tensor  # [n]
    upstream: tuple[Tensor, Tensor]  # [n], [n]: dL/dlogp, dL/dentropy


def make_case(n: int = 13, size: int = 24, vocab: int = 301, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(n * 1000 + vocab)
    labels = torch.randint(vocab, (n,), generator=generator)
    return Case(
        hidden=torch.randn(n, size, generator=generator).to(dtype).requires_grad_(),
        weight=(torch.randn(vocab, size, generator=generator) * 0.5).to(dtype).requires_grad_(),
        labels=labels,
        upstream=tuple(torch.randn(2, n, generator=generator)),
    )


def dense(case: Case, *, temperature: float = 1.0, vocab_size: int | None = None) -> SimpleNamespace:
    """log p, entropy, and the gradients of sum(upstream * them), in float64; ignored rows are left out."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (case.hidden, case.weight))
    live = case.labels != -100
    log_p = (hidden[live] @ weight[:vocab_size].t() / temperature).log_softmax(-1)
    chosen = log_p.gather(-1, case.labels[live, None])[:, 0]
    entropies = -(log_p.exp() * log_p).sum(-1)
    (chosen * case.upstream[0][live].double() + entropies * case.upstream[1][live].double()).sum().backward()
    log_probs, entropy = torch.zeros(2, len(live), dtype=torch.float64)
    log_probs[live], entropy[live] = chosen.detach(), entropies.detach()
    grad = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
    return SimpleNamespace(log_probs=log_probs, entropy=entropy, hidden=grad, weight=weight.grad)


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest error, relative to the largest value."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got.detach().double(), expected, rtol=0, atol=tolerance * (scale + 1e-3))


def check_log_probs(case: Case, **options) -> None:
    expected = dense(case, **{k: v for k, v in options.items() if k in ("temperature", "vocab_size")})
    log_probs, entropy = linear_log_probs(case.hidden, case.weight, case.labels, with_entropy=True, **options)
    torch.autograd.backward([log_probs, entropy], case.upstream)
    check(case, log_probs, entropy, case.hidden.grad, case.weight.grad, expected)


def weighted(case: Case, seen: list[Tensor] | None = None):
    """The loss whose gradients are `upstream`."""

    def token_loss(log_probs: Tensor, entropy: Tensor | None, positions: Tensor) -> Tensor:
        if seen is not None:
            seen.append(positions)
        loss = log_probs * case.upstream[0][positions]
        return loss if entropy is None else loss + entropy * case.upstream[1][positions]

    return token_loss


def check_loss(case: Case, **options) -> None:
    expected = dense(case, **{k: v for k, v in options.items() if k in ("temperature", "vocab_size")})
    seen: list[Tensor] = []
    loss, log_probs, entropy = linear_loss(
        case.hidden, case.weight, case.labels, weighted(case, seen), with_entropy=True, **options
    )
    assert not log_probs.requires_grad and not entropy.requires_grad
    assert torch.equal(torch.cat(seen), (case.labels != -100).nonzero()[:, 0])
    total = (expected.log_probs * case.upstream[0]).sum() + (expected.entropy * case.upstream[1]).sum()
    count = max(len(case.labels), 1)
    torch.testing.assert_close(loss.double(), total, rtol=0, atol=TOLERANCE[case.hidden.dtype] * 10 * count)
    loss.backward()
    check(case, log_probs, entropy, case.hidden.grad, case.weight.grad, expected)


def check(case: Case, log_probs: Tensor, entropy: Tensor, grad_hidden: Tensor, grad_weight: Tensor, expected) -> None:
    tolerance = TOLERANCE[case.hidden.dtype]
    assert log_probs.dtype == entropy.dtype == torch.float32
    assert grad_hidden.dtype == grad_weight.dtype == case.hidden.dtype
    assert_near(log_probs, expected.log_probs, tolerance)
    assert_near(entropy, expected.entropy, tolerance)
    assert_near(grad_hidden, expected.hidden, tolerance)
    assert_near(grad_weight, expected.weight, tolerance)


BOTH = pytest.mark.parametrize("check_it", [check_log_probs, check_loss])


@pytest.fixture
def narrow_tiles(monkeypatch):
    """Tiles of 64 columns, and products added a few rows at a time."""
    monkeypatch.setattr(linear, "TILE_BYTES", 4096)
    monkeypatch.setattr(linear, "LEAST_COLUMNS", 64)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_dense(check_it, dtype: torch.dtype) -> None:
    check_it(make_case(dtype=dtype), temperature=TEMPERATURE)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 100])
def test_chunks_and_tiles_change_nothing(narrow_tiles, check_it, dtype: torch.dtype, chunk_tokens: int) -> None:
    case = make_case(dtype=dtype)
    case.labels[[0, 7]] = -100
    check_it(case, temperature=TEMPERATURE, chunk_tokens=chunk_tokens)


@BOTH
@pytest.mark.parametrize("vocab", [1, 63, 64, 65])
def test_small_vocabularies(narrow_tiles, check_it, vocab: int) -> None:
    check_it(make_case(vocab=vocab), chunk_tokens=4)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [40, 129, 300])
def test_padding_is_never_read(narrow_tiles, check_it, dtype: torch.dtype, vocab_size: int) -> None:
    case = make_case(dtype=dtype)
    case.labels = case.labels % vocab_size
    with torch.no_grad():
        case.weight[vocab_size:] = float("nan")
    check_it(case, vocab_size=vocab_size, chunk_tokens=4)
    assert not case.weight.grad[vocab_size:].any()


@BOTH
def test_ignored_rows_reach_nothing(check_it) -> None:
    case = make_case()
    case.labels[[0, 3, 12]] = -100
    with torch.no_grad():
        case.hidden[[0, 3, 12]] = float("nan")
    check_it(case, chunk_tokens=3)
    assert not case.hidden.grad[[0, 3, 12]].any()


@BOTH
@pytest.mark.parametrize("n", [0, 3])
def test_nothing_counts(check_it, n: int) -> None:
    case = make_case(n=n)
    case.labels[:] = -100
    case.hidden.data.fill_(float("nan"))
    check_it(case)
    assert not case.hidden.grad.any() and not case.weight.grad.any()


class CountProducts(TorchDispatchMode):
    """Rows that take part in the products with a [v, H] matrix."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname in ("mm", "addmm", "addmm_") and args[-2].shape[0] != 301 and args[-2].shape[1] != 301:
            self.rows += args[-2].shape[0]
        return func(*args, **(kwargs or {}))


def test_ignored_rows_take_part_in_no_product() -> None:
    case = make_case(n=20)
    case.labels[:15] = -100
    for run in (
        lambda: linear_log_probs(case.hidden, case.weight, case.labels),
        lambda: linear_loss(case.hidden, case.weight, case.labels, weighted(case)),
    ):
        with CountProducts() as count:
            run()
        assert count.rows == 5


def test_leading_dimensions_and_strides() -> None:
    flat = make_case(n=12)
    hidden = flat.hidden.detach().view(4, 3, -1).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    labels = flat.labels.view(4, 3)
    assert not hidden.is_contiguous()
    expected = dense(flat)
    log_probs, _ = linear_log_probs(hidden, flat.weight, labels)
    assert log_probs.shape == (4, 3)
    assert_near(log_probs.flatten(), expected.log_probs, 2e-6)
    loss, log_probs, _ = linear_loss(hidden, flat.weight, labels, weighted(flat))
    loss.backward()
    assert hidden.grad.shape == hidden.shape and log_probs.shape == (4, 3)
    flat.upstream[1].zero_()
    flat.weight.grad = None
    assert_near(hidden.grad.reshape(12, -1), dense(flat).hidden, 2e-6)


def test_without_entropy() -> None:
    case = make_case()
    log_probs, entropy = linear_log_probs(case.hidden, case.weight, case.labels)
    _, detached, no_entropy = linear_loss(case.hidden, case.weight, case.labels, weighted(case))
    assert entropy is None and no_entropy is None
    torch.testing.assert_close(detached, log_probs.detach(), rtol=0, atol=1e-6)
    case.upstream[1].zero_()
    log_probs.backward(case.upstream[0])
    assert_near(case.hidden.grad, dense(case).hidden, 2e-6)


def test_gradient_of_the_entropy_alone() -> None:
    case = make_case()
    case.upstream[0].zero_()
    _, entropy = linear_log_probs(case.hidden, case.weight, case.labels, with_entropy=True)
    entropy.backward(case.upstream[1])
    assert_near(case.weight.grad, dense(case).weight, 5e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_and_infinite_ones(narrow_tiles, monkeypatch, sign: int) -> None:
    """Tiles whose maxima lie 1e4 apart merge exactly, and a tile of nothing but -inf has nothing to say."""
    monkeypatch.setattr(linear, "TILE_BYTES", 512)  # 64 columns of 2 rows
    case = make_case(n=2, size=1)
    case.hidden.data = torch.ones(2, 1)
    largest = torch.linspace(9999.0, 1e4, 237) if sign == 1 else torch.linspace(-1e4, -9999.0, 237)
    case.weight.data = torch.cat([torch.full((64,), -2e4), largest])[:, None]
    case.labels = torch.tensor([300, 70])
    expected = dense(case)
    for nothing in (-2e4, -float("inf")):
        case.weight.data[:64] = nothing
        log_probs, entropy = linear_log_probs(case.hidden, case.weight, case.labels, with_entropy=True)
        torch.testing.assert_close(log_probs.detach().double(), expected.log_probs, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(entropy.detach().double(), expected.entropy, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    case = make_case()
    getattr(case, frozen).requires_grad_(False)
    case.weight.main_grad = torch.zeros(case.weight.shape)
    log_probs, _ = linear_log_probs(case.hidden, case.weight, case.labels)
    log_probs.sum().backward()
    linear_loss(case.hidden, case.weight, case.labels, weighted(case))[0].backward()
    assert getattr(case, frozen).grad is None
    assert case.weight.main_grad.any() == (frozen == "hidden")


@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad_takes_the_weights_gradient(narrow_tiles, dtype: torch.dtype) -> None:
    """Twice: it is added, and autograd sees nothing."""
    case = make_case(dtype=dtype)
    case.labels[4] = -100
    expected = dense(case)
    tolerance = TOLERANCE[dtype]
    case.weight.main_grad = torch.ones(case.weight.shape)
    for count in (1, 2):
        outputs = linear_log_probs(case.hidden, case.weight, case.labels, with_entropy=True, chunk_tokens=5)
        torch.autograd.backward(outputs, case.upstream)
        assert_near(case.weight.main_grad - 1, count * expected.weight, tolerance)
    assert_near(case.hidden.grad, 2 * expected.hidden, tolerance)
    case.hidden.grad, case.weight.main_grad = None, torch.ones(case.weight.shape)
    for count in (1, 2):
        loss, _, _ = linear_loss(
            case.hidden, case.weight, case.labels, weighted(case), with_entropy=True, chunk_tokens=5, grad_scale=0.1
        )
        assert_near(case.weight.main_grad - 1, 0.1 * count * expected.weight, tolerance)
        (loss * 0.1).backward()
        assert_near(case.weight.main_grad - 1, 0.1 * count * expected.weight, tolerance)
    assert_near(case.hidden.grad, 0.2 * expected.hidden, tolerance)
    assert case.weight.grad is None


def test_evaluation_leaves_main_grad_alone() -> None:
    case = make_case()
    case.weight.main_grad = torch.zeros(case.weight.shape)
    with torch.no_grad():
        linear_log_probs(case.hidden, case.weight, case.labels)
        loss, _, _ = linear_loss(case.hidden, case.weight, case.labels, weighted(case))
    assert not loss.requires_grad
    assert not case.weight.main_grad.any()


def test_another_scale_than_announced_is_refused() -> None:
    case = make_case()
    case.weight.main_grad = torch.zeros(case.weight.shape)
    loss, _, _ = linear_loss(case.hidden, case.weight, case.labels, weighted(case), grad_scale=2.0)
    with pytest.raises(ValueError, match=r"called with 3\.0.*grad_scale=2\.0"):
        (loss * 3).backward()


def test_any_scale_will_do_without_main_grad() -> None:
    case = make_case()
    case.upstream[1].zero_()
    loss, _, _ = linear_loss(case.hidden, case.weight, case.labels, weighted(case), grad_scale=2.0)
    (loss * 3).backward()
    expected = dense(case)
    assert_near(case.hidden.grad, 3 * expected.hidden, 2e-6)
    assert_near(case.weight.grad, 3 * expected.weight, 2e-6)


def test_second_backward() -> None:
    """linear_log_probs computes again; linear_loss has nothing left."""
    case = make_case()
    case.upstream[1].zero_()
    expected = dense(case)
    log_probs, _ = linear_log_probs(case.hidden, case.weight, case.labels)
    for count in (1, 2):
        log_probs.backward(case.upstream[0], retain_graph=True)
        assert_near(case.weight.grad, count * expected.weight, 2e-6)
    loss, _, _ = linear_loss(case.hidden, case.weight, case.labels, weighted(case))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_recompute(use_reentrant: bool) -> None:
    case = make_case()
    outputs = checkpoint(
        lambda hidden, weight: linear_log_probs(hidden, weight, case.labels, with_entropy=True),
        case.hidden,
        case.weight,
        use_reentrant=use_reentrant,
    )
    torch.autograd.backward(outputs, case.upstream)
    expected = dense(case)
    assert_near(case.hidden.grad, expected.hidden, 2e-6)
    assert_near(case.weight.grad, expected.weight, 2e-6)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_no_bit(check_it, dtype: torch.dtype) -> None:
    plain, cast = make_case(dtype=dtype), make_case(dtype=dtype)
    check_it(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_it(cast)
    assert torch.equal(cast.hidden.grad, plain.hidden.grad)
    assert torch.equal(cast.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("loss_name, hyper", [("gft", {"tau": 0.05}), ("dft", {}), ("grpo", {})])
def test_linear_loss_equals_the_same_loss_on_log_probs(loss_name: str, hyper: dict) -> None:
    case = make_case(n=30)
    case.labels[::7] = -100
    sequence_ids = torch.arange(30) // 10
    constants = {"group_ids": torch.zeros(3), "sources": torch.tensor([0, 1, 2]), "advantages": torch.randn(3)}

    def token_loss(log_probs: Tensor, entropy: Tensor | None, positions: Tensor) -> Tensor:
        inputs = LossInputs(
            log_probs=log_probs,
            mask=case.labels[positions] != -100,
            sequence_ids=sequence_ids[positions],
            old_log_probs=log_probs.detach(),
            **constants,
        )
        return LOSSES[loss_name](inputs, **hyper)[0]

    log_probs, _ = linear_log_probs(case.hidden, case.weight, case.labels)
    expected = token_loss(log_probs, None, torch.arange(30)).sum()
    expected.backward()
    grads = case.hidden.grad, case.weight.grad
    case.hidden.grad = case.weight.grad = None
    loss, _, _ = linear_loss(case.hidden, case.weight, case.labels, token_loss, chunk_tokens=8)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_near(case.hidden.grad, grads[0].double(), 2e-6)
    assert_near(case.weight.grad, grads[1].double(), 2e-6)


def test_a_loss_without_gradient() -> None:
    case = make_case()
    loss, _, _ = linear_loss(case.hidden, case.weight, case.labels, lambda log_probs, *_: log_probs.detach())
    loss.backward()
    assert not case.hidden.grad.any() and not case.weight.grad.any()


def test_a_loss_of_the_wrong_shape_is_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="one loss a token"):
        linear_loss(case.hidden, case.weight, case.labels, lambda log_probs, *_: log_probs.sum())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.full((13,), 301)}, "label 301 is outside the vocabulary"),
        ({"labels": torch.full((13,), -1)}, "label -1 is outside the vocabulary"),
        ({"labels": torch.zeros(12, dtype=torch.int64)}, "labels must be int64"),
        ({"labels": torch.zeros(13)}, "labels must be int64"),
        ({"hidden": torch.zeros(13, 23)}, "hidden must be"),
        ({"hidden": torch.zeros(13, 24, dtype=torch.bfloat16)}, "must both be float32"),
        ({"hidden": torch.zeros(13, 24).double(), "weight": torch.zeros(301, 24).double()}, "must both be float32"),
        ({"weight": torch.zeros(0, 24)}, "weight"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"vocab_size": 302}, "vocab_size must be in"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    case = make_case()
    arguments = {"hidden": case.hidden, "weight": case.weight, "labels": case.labels} | change
    with pytest.raises(ValueError, match=message):
        linear_log_probs(**arguments)
    with pytest.raises(ValueError, match=message):
        linear_loss(**arguments, token_loss=weighted(case))


def test_main_grad_that_rounds_every_sum_is_refused() -> None:
    case = make_case()
    case.weight.main_grad = torch.zeros(case.weight.shape, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="main_grad must be float32"):
        linear_loss(case.hidden, case.weight, case.labels, weighted(case))


class LargestAllocation(TorchDispatchMode):
    """Remembers the size of the largest new tensor, each operator under its name."""

    num_bytes, name = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        known |= {a.untyped_storage().data_ptr() for a in (kwargs or {}).values() if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                size = tensor.untyped_storage().nbytes()
                if size > self.num_bytes:
                    self.num_bytes, self.name = size, func.name()
        return result


@pytest.mark.parametrize("num_tokens", [300, 1200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_allocation_depends_on_the_tile_alone(monkeypatch, dtype: torch.dtype, num_tokens: int) -> None:
    """With main_grad there is neither a tensor like the logits nor one like the weight, whatever the tokens."""
    monkeypatch.setattr(linear, "TILE_BYTES", 1 << 16)
    monkeypatch.setattr(linear, "LEAST_COLUMNS", 64)
    case = make_case(n=num_tokens, size=16, vocab=20_000, dtype=dtype)
    case.weight.main_grad = torch.zeros(case.weight.shape)
    row_bytes = 20_032 * case.hidden.element_size()
    with LargestAllocation() as largest:
        log_probs, _ = linear_log_probs(case.hidden, case.weight, case.labels, chunk_tokens=32)
        log_probs.sum().backward()
    assert largest.num_bytes <= max(1 << 16, num_tokens * 16 * 4), largest.name
    with LargestAllocation() as largest:
        linear_loss(case.hidden, case.weight, case.labels, weighted(case), chunk_tokens=8)[0].backward()
    assert largest.num_bytes <= max(8 * row_bytes, num_tokens * 16 * 4), largest.name


def test_reference_operators_give_the_same() -> None:
    """GFT_MEGATRON_REFERENCE=1 in a fresh process: the operators are chosen by name."""
    program = (
        "import sys; sys.path.insert(0, 'tests/unit');"
        "import test_linear as t; t.check_log_probs(t.make_case()); t.check_loss(t.make_case())"
    )
    environment = {**os.environ, "GFT_MEGATRON_REFERENCE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
