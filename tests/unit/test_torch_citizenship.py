"""What torch asks of an operator: registration, torch.compile, autocast, recompute, and no silent answers."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gft_megatron.losses import LOSSES, LossInputs
from gft_megatron.ops import rectified_cross_entropy, reference, segment_means, vocab_parallel_log_probs

OPS = torch.ops.gft_megatron
TEMPERATURE = 0.7


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_rows(n: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 1_000_003 + vocab)
    logits = torch.randn(n, vocab, generator=generator) * 4
    labels = torch.randint(vocab, (n,), generator=generator)
    labels[::2] = logits.argmax(-1)[::2]  # likely: not every coefficient is p
    labels[1:2] = -100
    return logits.to(dtype), labels


# Registration


def op_arguments(name: str, n: int) -> tuple:
    """Arguments as the wrappers pass them; a tensor that may have a gradient wants one."""
    logits, labels = make_rows(n, 100)
    vectors = torch.randn(5, n, generator=torch.Generator().manual_seed(5)).unbind()
    place = (0, 90, 1 / TEMPERATURE)
    labels = labels.clamp(max=89)
    stats = reference.row_stats(logits, labels, *place, True)[None]
    _, entropy, maximum, log_sum = reference.combine_stats(stats)
    leaf = logits.clone().requires_grad_()
    pair = (logits.flip(1), labels, *place[1:])
    shifts = (maximum, log_sum, logits.flip(1)[:, :90].amax(-1) / TEMPERATURE, log_sum)
    return {
        "row_stats": (logits, labels, *place, True),
        "merge_stats": (stats,),
        "combine_stats": (stats,),
        "row_grad_": (logits, torch.empty_like(logits), labels, *place, maximum, log_sum, entropy, *vectors[:2]),
        "rectified_sweep_": (logits, torch.empty_like(logits), labels, *place[1:], vectors[0], vectors[1].sigmoid()),
        "segment_sums": (vectors[0].clone().requires_grad_(), vectors[1] > 0, torch.arange(n) // 2, n),
        "group_advantages": (vectors[0].double(), torch.arange(n) // 3, True, 1, 1e-6),
        "log_probs": (leaf, labels, *place, True, "", False),
        "log_probs_grad": (logits, labels, *place, maximum, log_sum, entropy, *vectors[:2]),
        "kl_stats": (logits, *pair),
        "kl_grad_": (logits, pair[0], torch.empty_like(logits), *pair[1:], *shifts, vectors[0]),
        "kl": (leaf, *pair, ""),
        "kl_grad": (logits, *pair, *shifts, vectors[0]),
        "rectified": (leaf, labels, *place[1:], vectors[0].abs(), vectors[1].abs(), 1.0),  # opcheck backs |loss|
    }[name]


COMPILED = [
    "row_stats",
    "merge_stats",
    "combine_stats",
    "row_grad_",
    "rectified_sweep_",
    "kl_stats",
    "kl_grad_",
    "segment_sums",
    "group_advantages",
]
COMPOSED = ["kl", "kl_grad", "log_probs", "log_probs_grad", "rectified"]


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("name", COMPILED + COMPOSED)
def test_operators_are_registered_as_torch_expects(name: str, n: int) -> None:
    torch.library.opcheck(getattr(OPS, name).default, op_arguments(name, n))


@pytest.mark.parametrize("name", COMPOSED)
def test_operators_are_registered_as_torch_expects_in_reference_mode(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("GFT_MEGATRON_REFERENCE", "1")
    torch.library.opcheck(getattr(OPS, name).default, op_arguments(name, 7))


def test_no_operator_is_left_out() -> None:
    names = {schema.name.split("::")[1] for schema in torch._C._jit_get_all_schemas() if "gft_megatron" in schema.name}
    assert names == {*COMPILED, *COMPOSED}


@pytest.mark.parametrize("name", ["rectified_sweep_", "segment_sums", "group_advantages"])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_reference_agrees_operator_by_operator(name: str, n: int) -> None:
    arguments, again = op_arguments(name, n), op_arguments(name, n)
    actual, expected = getattr(OPS, name)(*arguments), getattr(reference, name)(*again)
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(arguments[1], again[1], rtol=2e-6, atol=2e-6)  # what rectified_sweep_ wrote


# torch.compile


def loss_inputs(n: int, log_probs: Tensor, entropy: Tensor | None) -> LossInputs:
    num_sequences = (n + 3) // 4
    return LossInputs(
        log_probs=log_probs,
        mask=torch.arange(n) % 3 > 0,
        sequence_ids=torch.arange(n) // 4,
        group_ids=torch.zeros(num_sequences, dtype=torch.int64),
        sources=torch.full((num_sequences,), 2),
        entropy=entropy,
        advantages=torch.arange(num_sequences) - 0.7,
        old_log_probs=log_probs.detach() + torch.sin(torch.arange(n)) * 0.5,
    )


def named_loss(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    log_probs, entropy = vocab_parallel_log_probs(logits, labels, temperature=TEMPERATURE, with_entropy=True)
    loss, _ = LOSSES[name](loss_inputs(len(labels), log_probs, entropy))
    return loss.sum() - 0.01 * entropy.sum()


def rectified_loss(logits: Tensor, labels: Tensor) -> Tensor:
    loss, _ = rectified_cross_entropy(logits, labels, torch.ones_like(labels, dtype=torch.float32), 0.5)
    return loss.sum()


def sequence_mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    log_probs, _ = vocab_parallel_log_probs(logits, labels)
    num_sequences = (len(labels) + 3) // 4
    sequence_ids = torch.arange(len(labels)) // 4
    return segment_means(log_probs, sequence_ids, num_sequences, mask=labels >= 0).square().sum()


LOSS_FUNCTIONS = {
    "gft": lambda logits, labels: named_loss("gft", logits, labels),
    "grpo": lambda logits, labels: named_loss("grpo", logits, labels),
    "rectified": rectified_loss,
    "sequence mean": sequence_mean_loss,
}


def loss_and_grad(fn: Callable, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = fn(leaf * 1, labels)
    loss.backward()
    return loss.detach(), leaf.grad


def assert_compiled_equals_eager(fn: Callable, backend: str, dynamic: bool | None, dtype: torch.dtype) -> None:
    compiled = torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)
    for n, vocab in ((9, 77), (16, 100), (5, 333)):
        logits, labels = make_rows(n, vocab, dtype)
        actual, expected = loss_and_grad(compiled, logits, labels), loss_and_grad(fn, logits, labels)
        assert expected[1].any()
        torch.testing.assert_close(actual, expected, rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=1e-7)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", LOSS_FUNCTIONS)
def test_compiled_equals_eager(name: str, dynamic: bool) -> None:
    assert_compiled_equals_eager(
        LOSS_FUNCTIONS[name], "aot_eager", dynamic, torch.bfloat16 if dynamic else torch.float32
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", LOSS_FUNCTIONS)
def test_inductor_equals_eager(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("CXX", "g++")
    assert_compiled_equals_eager(LOSS_FUNCTIONS[name], "inductor", None, torch.float32)


@pytest.mark.parametrize("layout", ["shifted", "sequence first", "transposed"])
def test_compiled_equals_eager_where_rows_are_not_dense(layout: str) -> None:
    def fn(leaf: Tensor, labels: Tensor) -> Tensor:
        logits = {
            "shifted": leaf.view(3, 4, 80)[:, :-1, :77],
            "sequence first": leaf.view(4, 3, 80)[:3].transpose(0, 1),
            "transposed": leaf.view(80, 12).t()[:9].view(3, 3, 80),
        }[layout]
        log_probs, _ = vocab_parallel_log_probs(logits, labels)
        loss, _ = rectified_cross_entropy(logits * 1, labels, torch.ones(3, 3), 0.5)
        return log_probs.sum() + loss.sum()

    logits, labels = make_rows(12, 80)[0], torch.arange(9).view(3, 3)
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss_and_grad(compiled, logits, labels), loss_and_grad(fn, logits, labels))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graph_keeps_the_logits_that_it_was_asked_to_overwrite(dynamic: bool) -> None:
    def fn(logits: Tensor, labels: Tensor) -> Tensor:
        return vocab_parallel_log_probs(logits, labels, inplace_backward=True)[0].sum()

    logits, labels = make_rows(9, 77)
    output = logits.requires_grad_() * 1
    torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=dynamic)(output, labels).backward()
    assert torch.equal(output, logits)
    expected = loss_and_grad(fn, logits.detach(), labels)[1]
    torch.testing.assert_close(logits.grad, expected)


def bad_label(logits: Tensor, labels: Tensor) -> Tensor:
    return vocab_parallel_log_probs(logits, labels + 77)[0].sum()


def bad_rectified_label(logits: Tensor, labels: Tensor) -> Tensor:
    return rectified_cross_entropy(logits, labels + 77, torch.ones(9), 0.5)[0].sum()


def bad_upstream(logits: Tensor, labels: Tensor) -> Tensor:
    return rectified_cross_entropy(logits, labels, torch.ones(9), 0.5)[0].sum() * 2


def bad_segments(logits: Tensor, labels: Tensor) -> Tensor:
    return segment_means(logits[:, 0], labels, 100).sum()


def decreasing_segments(logits: Tensor, labels: Tensor) -> Tensor:
    return segment_means(logits[:, 0], torch.arange(9).flip(0), 9).sum()


@pytest.mark.parametrize(
    "fn, message",
    [
        (bad_label, r"a label is outside the vocabulary \[0, 77\)"),
        (bad_rectified_label, r"a label is outside the vocabulary \[0, 77\)"),
        (bad_upstream, "grad_scale=1.0"),
        (bad_segments, r"a segment id is outside \[0, 100\)"),
        (decreasing_segments, "segment ids decrease"),
    ],
)
def test_compiled_graph_reports_wrong_values(fn: Callable, message: str) -> None:
    logits, labels = make_rows(9, 77)
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=message):
        loss_and_grad(compiled, logits, labels)


# Autocast


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", LOSS_FUNCTIONS)
def test_autocast_changes_nothing(name: str, compiled: bool) -> None:
    fn = LOSS_FUNCTIONS[name]
    logits, labels = make_rows(9, 77)
    expected = loss_and_grad(fn, logits, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maybe = torch.compile(fn, backend="aot_eager", fullgraph=True) if compiled else fn
        actual = loss_and_grad(maybe, logits, labels)
    if compiled:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


# Activation recompute


def log_probs_of(inplace_backward: bool) -> Callable:
    def fn(logits: Tensor, labels: Tensor) -> Tensor:
        return -vocab_parallel_log_probs(logits, labels, inplace_backward=inplace_backward)[0].sum()

    return fn


RECOMPUTED = {
    "log_probs": log_probs_of(False),
    "log_probs in place": log_probs_of(True),
    "rectified": rectified_loss,
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inside", ["head", "loss", "both"])
@pytest.mark.parametrize("name", RECOMPUTED)
def test_activation_recompute_changes_nothing(name: str, inside: str, use_reentrant: bool) -> None:
    fn = RECOMPUTED[name]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 16, generator=generator), torch.randn(77, 16, generator=generator)
    labels = make_rows(9, 77)[1]

    def recompute(function: Callable, *args: Tensor) -> Tensor:
        return checkpoint(function, *args, use_reentrant=use_reentrant)

    def head(x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(x) @ w.t()

    def run(inside: str) -> list[Tensor]:
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if inside == "head":
            loss = fn(recompute(head, x, w), labels)
        elif inside == "loss":
            loss = recompute(fn, head(x, w), labels)
        elif inside == "both":
            loss = recompute(lambda x, w, labels: fn(head(x, w), labels), x, w, labels)
        else:
            loss = fn(head(x, w), labels)
        loss.backward()
        return [loss.detach(), x.grad, w.grad]

    torch.testing.assert_close(run(inside), run("nothing"), rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", RECOMPUTED)
def test_activation_recompute_with_another_user_of_the_logits(name: str, use_reentrant: bool) -> None:
    def run(square_first: Callable, recompute: bool) -> Tensor:
        def fn(logits: Tensor, labels: Tensor) -> Tensor:
            output = logits * 1
            return square_first(output) + RECOMPUTED[name](output, labels)

        leaf = logits.clone().requires_grad_()
        (checkpoint(fn, leaf, labels, use_reentrant=use_reentrant) if recompute else fn(leaf, labels)).backward()
        return leaf.grad

    logits, labels = make_rows(9, 77)
    expected = run(lambda output: (output * 1).square().sum(), False)  # saves a copy
    if use_reentrant and name != "log_probs":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(lambda output: output.square().sum(), True)
    else:
        assert torch.equal(run(lambda output: output.square().sum(), True), expected)


# No silent answers


@pytest.mark.parametrize("name", RECOMPUTED)
def test_gradient_of_the_gradient_is_refused(name: str) -> None:
    logits, labels = make_rows(9, 77)
    leaf = logits.requires_grad_()
    one = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(RECOMPUTED[name](leaf * 1, labels) * one, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", RECOMPUTED)
def test_function_transforms_are_refused(name: str) -> None:
    logits, labels = make_rows(9, 77)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(RECOMPUTED[name])(logits, labels)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.vmap(RECOMPUTED[name], in_dims=(0, None))(logits.expand(2, 9, 77), labels)


@pytest.mark.parametrize("strides", [(0, 77, 1), (60, 200, 1), (200, 76, 1), (77, 77, 1)])
def test_overlapping_rows_are_not_overwritten(strides: tuple[int, int, int]) -> None:
    memory = torch.randn(600, generator=torch.Generator().manual_seed(3)).requires_grad_()
    labels = torch.tensor([[5, 76, 0], [1, 2, 3]])
    with pytest.raises(ValueError, match="inplace_backward needs a row of memory for every token"):
        vocab_parallel_log_probs((memory * 1).as_strided((2, 3, 77), strides), labels, inplace_backward=True)
    log_probs, _ = vocab_parallel_log_probs((memory * 1).as_strided((2, 3, 77), strides), labels)
    loss, _ = rectified_cross_entropy((memory * 1).as_strided((2, 3, 77), strides), labels, torch.ones(2, 3), 0.0)
    assert torch.equal(loss, -log_probs)
    (expected,), (actual,) = torch.autograd.grad(-log_probs.sum(), memory), torch.autograd.grad(loss.sum(), memory)
    torch.testing.assert_close(actual, expected, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gft", "grpo", "rectified", "sequence mean"])
def test_every_run_gives_the_same_bits(name: str) -> None:
    logits, labels = make_rows(9, 5003, torch.bfloat16)
    first = loss_and_grad(LOSS_FUNCTIONS[name], logits, labels)
    for _ in range(99):
        again = loss_and_grad(LOSS_FUNCTIONS[name], logits, labels)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])
