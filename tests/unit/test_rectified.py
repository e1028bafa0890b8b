"""rectified_cross_entropy against a dense float64 computation, and what it says where it cannot answer."""

import pytest
import torch
from oracle import assert_grad_close
from torch import Tensor

from gft_megatron.losses.gft import rectify
from gft_megatron.ops import rectified_cross_entropy, vocab_parallel_log_probs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")
TEMPERATURE = 0.7


def make_case(n: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits whose labels are likely in every other row, labels, and weights of both signs."""
    generator = torch.Generator().manual_seed(n * 1_000_003 + vocab)
    logits = torch.randn(n, vocab, generator=generator) * 4
    labels = torch.randint(vocab, (n,), generator=generator)
    labels[::2] = logits.argmax(-1)[::2]
    return logits.to(dtype), labels, torch.randn(n, generator=generator)


def dense(
    logits: Tensor, labels: Tensor, weights: Tensor, tau: Tensor, vocab: int, grad_scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log p [n] and gradient [n, v] in float64, row by row. Rows of label -100 are 0."""
    losses, log_probs, grad = torch.zeros(len(labels)), torch.zeros(len(labels)), torch.zeros(logits.shape)
    losses, log_probs, grad = losses.double(), log_probs.double(), grad.double()
    for i in (labels != -100).nonzero()[:, 0].tolist():
        x = logits[i, :vocab].double().requires_grad_()
        log_p = (x / TEMPERATURE).log_softmax(-1)[labels[i]]
        p = float(log_p.exp())
        coefficient = p if p < float(tau[i]) else 1.0
        loss = -float(weights[i]) * coefficient * log_p
        (loss * grad_scale).backward()
        losses[i], log_probs[i], grad[i, :vocab] = loss.detach(), log_p.detach(), x.grad
    return losses, log_probs, grad


def check(logits: Tensor, labels: Tensor, weights: Tensor, tau: float | Tensor, vocab: int, **options) -> Tensor:
    """Compare one call and its backward with `dense`; return the gradient."""
    expected = dense(logits, labels, weights, torch.as_tensor(tau).expand(len(labels)), vocab, **options)
    leaf = logits.detach().requires_grad_()
    output = leaf * 1
    loss, log_probs = rectified_cross_entropy(
        output, labels, weights, tau, temperature=TEMPERATURE, vocab_size=vocab, **options
    )
    assert loss.dtype == log_probs.dtype == torch.float32 and not log_probs.requires_grad
    torch.testing.assert_close(log_probs.double(), expected[1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(loss.double(), expected[0], rtol=2e-5, atol=1e-5)
    (loss.sum() * options.get("grad_scale", 1.0)).backward()
    assert_grad_close(leaf.grad, expected[2])
    return leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("n, vocab", [(6, 1), (6, 7), (6, 1000), (3, 50257), (2, 151936), (1, 77)])
def test_matches_dense(n: int, vocab: int, tau: float, dtype: torch.dtype) -> None:
    check(*make_case(n, vocab, dtype), tau, vocab)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tau_of_every_row_padding_and_ignored_rows(dtype: torch.dtype) -> None:
    logits, labels, weights = make_case(8, 1000, dtype)
    labels = labels.clamp(max=989)
    logits[:, 990:] = NAN
    logits[3] = NAN
    labels[3] = -100
    weights[3] = NAN
    grad = check(logits, labels, weights, torch.tensor([0.0, 0.5, 2.0, 0.1] * 2), 990)
    assert not grad[:, 990:].any() and not grad[3].any()


def test_grad_scale_is_in_the_gradient_and_not_in_the_loss() -> None:
    check(*make_case(6, 100, torch.float32), 0.5, 100, grad_scale=0.125)


def test_row_of_weight_zero_has_loss_and_gradient_zero_whatever_it_holds() -> None:
    logits, labels, weights = make_case(3, 77, torch.float32)
    logits[1], weights[1] = NAN, 0.0
    leaf = logits.requires_grad_()
    loss, log_probs = rectified_cross_entropy(leaf * 1, labels, weights, 0.5)
    loss.sum().backward()
    assert loss[1] == 0 and log_probs.isnan().tolist() == [False, True, False]
    assert not leaf.grad[1].any() and leaf.grad.isfinite().all()


def test_no_rows() -> None:
    logits = torch.zeros(0, 77, requires_grad=True)
    loss, log_probs = rectified_cross_entropy(logits * 1, torch.zeros(0, dtype=torch.int64), torch.zeros(0), 0.5)
    loss.sum().backward()
    assert loss.shape == log_probs.shape == (0,) and logits.grad.shape == (0, 77)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "shifted", "sequence first", "transposed", "expanded"])
def test_layout_of_the_logits_changes_nothing(layout: str, dtype: torch.dtype) -> None:
    whole = make_case(8, 79, dtype)[0]
    logits = {
        "dense": whole.view(2, 4, 79)[:, :3, :77].contiguous(),
        "shifted": whole.view(2, 4, 79)[:, :-1, :77],
        "sequence first": whole.view(4, 2, 79)[:3, :, 2:].transpose(0, 1),
        "transposed": whole[:6, :77].t().contiguous().t().unflatten(0, (2, 3)),
        "expanded": whole.view(2, 4, 79)[:1, :3, :77].expand(2, 3, 77),
    }[layout]
    labels = torch.randint(77, (2, 3), generator=torch.Generator().manual_seed(0))
    weights = torch.arange(6.0).view(2, 3) - 2

    def run(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grads = []
        logits = logits.detach().requires_grad_()
        output = logits.view(logits.shape)
        output.register_hook(grads.append)
        loss, log_probs = rectified_cross_entropy(output, labels, weights, 0.5)
        loss.sum().backward()
        return loss, log_probs, grads[0]

    expected = run(logits.clone(memory_format=torch.contiguous_format))
    for actual, wanted in zip(run(logits), expected, strict=True):
        assert actual.shape[:2] == (2, 3)
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_two_pass_operators(dtype: torch.dtype) -> None:
    logits, labels, weights = make_case(6, 5000, dtype)
    swept, twice = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, log_probs = rectified_cross_entropy(swept * 1, labels, weights, 0.5)
    loss.sum().backward()
    expected, _ = vocab_parallel_log_probs(twice, labels)
    (-weights * rectify(expected, 0.5) * expected).sum().backward()
    assert torch.equal(log_probs, expected)
    assert_grad_close(swept.grad, twice.grad.double())


def test_logits_hold_the_gradient_where_one_is_wanted() -> None:
    logits, labels, weights = make_case(5, 77, torch.float32)
    before = logits.clone()
    wanted, _ = rectified_cross_entropy(logits, labels, weights, 0.5)
    with torch.no_grad():
        unwanted, _ = rectified_cross_entropy(logits.requires_grad_(), labels, weights, 0.5)
    assert torch.equal(wanted, unwanted) and torch.equal(logits, before)

    output = logits * 1
    seen: list[Tensor] = []
    output.register_hook(seen.append)
    loss, _ = rectified_cross_entropy(output, labels, weights, 0.5)
    assert torch.equal(loss, wanted)
    loss.sum().backward()
    assert seen[0].data_ptr() == output.data_ptr()
    assert torch.equal(output, logits.grad)


def test_another_user_of_overwritten_logits_is_told() -> None:
    logits, labels, weights = make_case(5, 77, torch.float32)
    output = logits.requires_grad_() * 1
    square = output.square().sum()  # saves the logits
    loss, _ = rectified_cross_entropy(output, labels, weights, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square + loss.sum()).backward()


def test_overwritten_gradient_is_told() -> None:
    logits, labels, weights = make_case(5, 77, torch.float32)
    output = logits.requires_grad_() * 1
    loss, _ = rectified_cross_entropy(output, labels, weights, 0.5)
    output.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_second_backward_is_refused() -> None:
    logits, labels, weights = make_case(5, 77, torch.float32)
    loss, _ = rectified_cross_entropy(logits.requires_grad_() * 1, labels, weights, 0.5)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second one needs vocab_parallel_log_probs"):
        loss.sum().backward()


def test_another_upstream_gradient_than_grad_scale_is_refused() -> None:
    logits, labels, weights = make_case(5, 77, torch.float32)
    weights[2], labels[3] = 0.0, -100
    upstream = torch.tensor([1.0, 1.0, 7.0, 7.0, 1.0])  # rows 2 and 3 have no gradient to scale
    loss, _ = rectified_cross_entropy(logits.requires_grad_() * 1, labels, weights, 0.5)
    loss.backward(upstream)
    for grad_scale, factor in ((1.0, 0.5), (0.5, 1.0)):
        loss, _ = rectified_cross_entropy(logits * 1, labels, weights, 0.5, grad_scale=grad_scale)
        with pytest.raises(ValueError, match=rf"grad_scale={grad_scale} .*\(found {factor}\)"):
            (loss.sum() * factor).backward()


def test_every_run_gives_the_same_bits() -> None:
    logits, labels, weights = make_case(4, 5003, torch.bfloat16)
    first = check(logits, labels, weights, 0.5, 5003)
    assert all(torch.equal(check(logits, labels, weights, 0.5, 5003), first) for _ in range(99))


def test_reference_mode_matches_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFT_MEGATRON_REFERENCE", "1")
    logits, labels, weights = make_case(6, 100, torch.float32)
    labels = labels.clamp(max=89)
    labels[0] = -100
    check(logits, labels, weights, 0.5, 90)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.tensor([0, 77, 2])}, r"label 77 is outside the vocabulary \[0, 77\)"),
        ({"labels": torch.tensor([0, 76, 2]), "vocab_size": 76}, r"label 76 is outside the vocabulary \[0, 76\)"),
        ({"weights": torch.ones(2)}, r"weights must be floating \(3,\) on cpu, got torch.float32 \(2,\)"),
        ({"weights": torch.ones(3, dtype=torch.int64)}, "weights must be floating"),
        ({"weights": torch.ones(3, requires_grad=True)}, "weights must be a constant"),
        ({"tau": torch.ones(4)}, r"tau must be floating \(3,\)"),
        ({"tau": torch.ones(3, requires_grad=True)}, "tau must be a constant"),
        ({"logits": torch.zeros(3, 77, dtype=torch.float64)}, "logits must be float32, bfloat16 or float16"),
        ({"vocab_size": 78}, r"vocab_size must be in \[1, 77\]"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
@pytest.mark.parametrize("want_gradient", [False, True])
def test_wrong_arguments_are_named(change: dict, message: str, want_gradient: bool) -> None:
    arguments = {"logits": torch.zeros(3, 77), "labels": torch.tensor([0, 1, 2]), "weights": torch.ones(3), "tau": 0.5}
    arguments |= change
    arguments["logits"].requires_grad_(want_gradient)
    with pytest.raises(ValueError, match=message):
        rectified_cross_entropy(**arguments)
