"""Random calls of the operators against dense float64: 500 cases of shapes, strides, dtypes, shard splits and contents.

Hypothesis draws the structure of a case and a seed for the numbers in it. Logits lie anywhere in a larger buffer, so
that every alignment and every row stride occurs, and whatever lies around them must be left alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Dense, assert_grad_close, dense_answer
from torch import Tensor

from gft_megatron import vocab_parallel_log_probs
from gft_megatron.ops import build_info

OPS = torch.ops.gft_megatron
INF, NAN = float("inf"), float("nan")
AROUND = 7.0  # fills the buffer between and around the logits; exact in every dtype

# Vector widths, cache lines and the cache blocks of the CPU operators end at multiples of these.
EDGES = [multiple * base for base in (16, 64) for multiple in (1, 2, 3, 8, 16)] + [4096, 8192]
WIDTHS = st.one_of(
    st.integers(1, 70),
    st.builds(lambda edge, shift: max(1, edge + shift), st.sampled_from(EDGES), st.integers(-2, 2)),
    st.integers(70, 3000),
    st.integers(1000, 3000),  # a range is drawn from its lower end first
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
ROWS = st.sampled_from(["noise", "equal", "one token", "unlikely tokens", "label at zero", "ignored"])
UPSTREAM = st.sampled_from(["all", "some", "none"])


@dataclass(frozen=True)
class Content:
    """What the logits, the labels and the upstream gradients hold."""

    dtype: torch.dtype
    width: int  # columns, of which `vocab` exist
    vocab: int
    rows: list[str]
    offset: float
    scale: float
    temperature: float
    upstream: tuple[str, str]  # which rows the gradients of log-prob and entropy are not 0 in
    seed: int


@st.composite
def contents(draw: st.DrawFn, min_rows: int = 0) -> Content:
    width = draw(WIDTHS)
    return Content(
        dtype=draw(DTYPES),
        width=width,
        vocab=draw(st.one_of(st.just(width), st.integers(1, width))),
        rows=draw(st.lists(ROWS, min_size=min_rows, max_size=9)),
        offset=draw(st.sampled_from([0.0, 0.0, -3.5, 1e4, -1e4])),
        scale=draw(st.sampled_from([4.0, 1.0, 0.01, 30.0])),
        temperature=draw(st.sampled_from([1.0, 0.7, 0.3, 3.0])),
        upstream=(draw(UPSTREAM), draw(UPSTREAM)),
        seed=draw(st.integers(0, 2**31)),
    )


def fill(logits: Tensor, content: Content) -> Tensor:  # [n, width], any strides -> [n] labels
    """Write the logits; what a row must not be read for is NaN."""
    generator = torch.Generator().manual_seed(content.seed)
    n, vocab = len(content.rows), content.vocab
    labels = torch.randint(vocab, (n,), generator=generator)
    values = torch.randn(n, content.width, generator=generator) * content.scale + content.offset
    values[:, vocab:] = NAN
    for row, kind in enumerate(content.rows):
        likely = int(torch.randint(vocab, (), generator=generator))
        if kind == "equal":
            values[row, :vocab] = content.offset
        elif kind == "one token":
            values[row, :vocab] = -INF
        elif kind == "unlikely tokens":
            values[row, :vocab].masked_fill_(torch.rand(vocab, generator=generator) < 0.7, -INF)
        elif kind == "label at zero":
            values[row, labels[row]] = -INF
        elif kind == "ignored":
            values[row] = NAN
            labels[row] = -100
        if kind in ("one token", "unlikely tokens", "label at zero"):
            values[row, likely] = content.offset
    logits.copy_(values)
    return labels


def upstream(content: Content) -> tuple[Tensor, Tensor]:
    """At most 1 in units of the temperature, so that gradients that cancel to 0 are compared on the scale of 1."""
    generator = torch.Generator().manual_seed(content.seed + 1)
    n = len(content.rows)

    def draw(which: str) -> Tensor:
        grad = (torch.rand(n, generator=generator) * 2 - 1) * content.temperature
        kept = {"all": 1.0, "some": 0.5, "none": 0.0}[which]
        return grad * (torch.rand(n, generator=generator) < kept)

    return draw(content.upstream[0]), draw(content.upstream[1])


def expected_answer(logits: Tensor, labels: Tensor, content: Content, grads: tuple[Tensor, Tensor]) -> Dense:
    return dense_answer(logits, labels, *grads, temperature=content.temperature, vocab_size=content.vocab)


def assert_log_probs_close(log_probs: Tensor, expected: Tensor) -> None:
    """Within 1e-5; the relative part is fp32's own spacing, which exceeds 1e-5 below -128."""
    torch.testing.assert_close(log_probs.double(), expected, rtol=2.5e-7, atol=1e-5)


def assert_entropy_close(entropy: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-6, atol=5e-6)


@dataclass(frozen=True)
class Layout:
    """Where logits [a, b, width] lie in their buffer."""

    lead: tuple[int, int]
    start: int
    gap: int  # between rows; with an odd width every row has its own alignment
    transposed: bool
    outer_gap: int  # between the [b, width] or [a, width] blocks: the leading dimensions cannot be merged

    def place(self, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The buffer [*] and the logits [a, b, width] in it."""
        a, b = self.lead
        inner, outer = (a, b) if self.transposed else (b, a)
        row = width + self.gap
        block = inner * row + self.outer_gap
        buffer = torch.full((self.start + outer * block + 1,), AROUND, dtype=dtype)
        strides = (row, block, 1) if self.transposed else (block, row, 1)
        return buffer, buffer.as_strided((a, b, width), strides, self.start)


@st.composite
def layouts(draw: st.DrawFn, n: int) -> Layout:
    a = draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0] or [1]))
    gaps = st.one_of(st.just(0), st.integers(0, 40))
    return Layout((a, n // a), draw(st.integers(0, 33)), draw(gaps), draw(st.booleans()), draw(gaps))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_call_matches_dense(data: st.DataObject) -> None:
    content = data.draw(contents())
    layout = data.draw(layouts(len(content.rows)))
    inplace, with_entropy = data.draw(st.booleans()), data.draw(st.booleans())

    buffer, logits = layout.place(content.width, content.dtype)
    n = len(content.rows)
    labels = fill(flat := torch.empty(n, content.width, dtype=content.dtype), content)
    logits.copy_(flat.view_as(logits))
    before = buffer.clone()
    grads = upstream(content) if with_entropy else (upstream(content)[0], torch.zeros(n))
    expected = expected_answer(flat, labels, content, grads)

    leaf = logits.detach().requires_grad_()
    log_probs, entropy = vocab_parallel_log_probs(
        leaf,
        labels.view(layout.lead),
        temperature=content.temperature,
        with_entropy=with_entropy,
        inplace_backward=inplace,
        vocab_size=content.vocab,
    )
    assert log_probs.shape == layout.lead and (entropy is not None) is with_entropy
    assert_log_probs_close(log_probs.reshape(-1), expected.log_probs)
    outputs = [log_probs]
    if with_entropy:
        assert_entropy_close(entropy.reshape(-1), expected.entropy)
        outputs.append(entropy)
    assert same_bits(buffer, before), "the forward pass wrote to its input"

    upstreams = [grad.view(layout.lead) for grad in grads]
    (grad,) = torch.autograd.grad(outputs, leaf, upstreams[: len(outputs)])
    assert_grad_close(grad.reshape(n, content.width), expected.grad)
    assert not grad[..., content.vocab :].any()
    if inplace and n:
        assert grad.data_ptr() == logits.data_ptr()
        logits.copy_(flat.view_as(logits))
    assert same_bits(buffer, before), "the backward pass wrote beside its output"


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shards_match_dense(data: st.DataObject) -> None:
    content = data.draw(contents(min_rows=1))
    cuts = data.draw(st.lists(st.integers(1, content.width), max_size=4, unique=True).map(sorted))
    edges = [0, *(cut for cut in cuts if cut < content.width), content.width]
    gap, start, grad_start = (data.draw(st.integers(0, 33)) for _ in range(3))
    inplace, want_entropy = data.draw(st.booleans()), data.draw(st.booleans())

    n = len(content.rows)
    _, logits = Layout((1, n), start, gap, False, 0).place(content.width, content.dtype)
    labels = fill(logits[0], content)
    logits = logits[0]
    given_logits = logits.clone()
    grads = upstream(content) if want_entropy else (upstream(content)[0], torch.zeros(n))
    expected = expected_answer(given_logits, labels, content, grads)

    shards = list(zip(edges, edges[1:], strict=False))
    places = [
        (begin, min(max(content.vocab - begin, 0), end - begin), 1 / content.temperature) for begin, end in shards
    ]
    parts = [logits[:, begin:end] for begin, end in shards]
    stats = [OPS.row_stats(part, labels, *place, want_entropy) for part, place in zip(parts, places, strict=True)]
    log_probs, entropy, maximum, log_sum = OPS.combine_stats(torch.stack(stats))
    assert_log_probs_close(log_probs, expected.log_probs)
    if want_entropy:
        assert_entropy_close(entropy, expected.entropy)
    assert same_bits(logits, given_logits)

    whole = Layout((1, n), grad_start, 33 - gap, False, 0).place(content.width, content.dtype)[1][0]
    whole.fill_(NAN)  # every element has to be written
    for part, place, (begin, end) in zip(parts, places, shards, strict=True):
        grad = part if inplace else whole[:, begin:end]
        grad_entropy = grads[1] if want_entropy else None
        OPS.row_grad_(part, grad, labels, *place, maximum, log_sum, entropy, grads[0], grad_entropy)
    assert_grad_close(logits if inplace else whole, expected.grad)
    assert inplace or same_bits(logits, given_logits)


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = torch.int32 if a.element_size() == 4 else torch.int16
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(content=contents(), poison=st.sampled_from([NAN, INF]), place=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_poison_reaches_the_log_prob_of_its_row_and_no_other(
    content: Content, poison: float, place: tuple[float, float]
) -> None:
    logits = torch.empty(len(content.rows), content.width, dtype=content.dtype)
    labels = fill(logits, content)
    live = (labels != -100).nonzero()[:, 0].tolist()
    if not live:
        return
    row, column = live[int(place[0] * (len(live) - 1))], int(place[1] * (content.vocab - 1))
    logits[row, column] = poison
    log_probs, entropy = vocab_parallel_log_probs(
        logits, labels, with_entropy=True, temperature=content.temperature, vocab_size=content.vocab
    )
    expected = torch.arange(len(labels)) == row
    assert torch.equal(log_probs.isnan(), expected)
    assert torch.equal(entropy.isnan(), expected)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(content=contents(), where=st.floats(0, 1), label=st.one_of(st.integers(-5000, -1), st.integers(0, 5000)))
def test_label_outside_the_vocabulary_is_refused(content: Content, where: float, label: int) -> None:
    logits = torch.empty(len(content.rows), content.width, dtype=content.dtype)
    labels = fill(logits, content)
    outside = content.vocab + label if label >= 0 else label
    if not len(labels) or outside == -100:
        return
    labels[int(where * (len(labels) - 1))] = outside
    with pytest.raises(ValueError, match=rf"label {outside} is outside the vocabulary \[0, {content.vocab}\)"):
        vocab_parallel_log_probs(logits, labels, vocab_size=content.vocab)


ISAS = ["baseline", "avx2", "avx512", "avx512_bf16"]


@pytest.mark.skipif(build_info()["isa"] not in ISAS, reason="no choice of instruction sets on this machine")
@pytest.mark.parametrize("isa", ISAS[: ISAS.index(build_info()["isa"])] if build_info()["isa"] in ISAS else [])
def test_narrower_instruction_sets(isa: str) -> None:
    environment = os.environ | {"GFT_MEGATRON_ISA": isa}
    select = ["-k", "matches_dense or match_dense or poison"]
    pytest_again = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, *select]
    result = subprocess.run(pytest_again, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
