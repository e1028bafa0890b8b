"""linear_log_probs and linear_loss on tensor-parallel ranks: the dense answer, one set of bits, few collectives."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from test_log_probs import count_collectives
from torch import Tensor

from gft_megatron import linear_log_probs, linear_loss
from gft_megatron.ops import linear

SIZE, TEMPERATURE = 16, 0.7
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


def make_case(world_size: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [12, H], weight [p * width, H], labels [12] in every corner of every shard, upstream [2, 12]."""
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(12, SIZE, generator=generator).to(dtype)
    weight = (torch.randn(world_size * width, SIZE, generator=generator) * 0.5).to(dtype)
    corners = [label for r in range(world_size) for label in (r * width, min((r + 1) * width, vocab) - 1)]
    labels = torch.randint(vocab, (12,), generator=generator)
    labels[: len(corners)] = torch.tensor([min(label, vocab - 1) for label in corners])
    weight[vocab:] = float("nan")  # padding
    hidden[7] = float("nan")
    labels[7] = -100
    return hidden, weight, labels, torch.randn(2, 12, generator=generator)


def dense(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, vocab: int) -> tuple[Tensor, ...]:
    """log-probs, entropy, d hidden, d weight in float64; ignored rows and padding are 0."""
    live = labels != -100
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = (x[live] @ w[:vocab].t() / TEMPERATURE).log_softmax(-1)
    chosen = log_p.gather(-1, labels[live, None])[:, 0]
    entropies = -(log_p.exp() * log_p).sum(-1)
    (chosen * upstream[0, live].double() + entropies * upstream[1, live].double()).sum().backward()
    values = torch.zeros(2, len(labels), dtype=torch.float64)
    values[0, live], values[1, live] = chosen.detach(), entropies.detach()
    return values[0], values[1], x.grad, w.grad


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got.detach().double(), expected, rtol=0, atol=tolerance * (scale + 1e-3))


def assert_same_everywhere(values: Tensor, world_size: int) -> None:
    everyone = [torch.empty_like(values) for _ in range(world_size)]
    dist.all_gather(everyone, values)
    assert all(torch.equal(other, values) for other in everyone)


def check_case(
    rank: int,
    world_size: int,
    calls: list[str],
    width: int,
    vocab: int,
    dtype: torch.dtype,
    sequence_parallel: bool,
    has_main_grad: bool,
) -> None:
    hidden, weight, labels, upstream = make_case(world_size, width, vocab, dtype)
    expected = dense(hidden, weight, labels, upstream, vocab)
    shard = slice(rank * width, (rank + 1) * width)
    mine = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size) if sequence_parallel else slice(None)
    options = {
        "tp_group": dist.group.WORLD,
        "sequence_parallel": sequence_parallel,
        "temperature": TEMPERATURE,
        "with_entropy": True,
        "vocab_size": vocab,
        "chunk_tokens": 5,  # three chunks
    }
    gathers = ["all_gather_into_tensor"] if sequence_parallel else []
    reduction = ["reduce_scatter_tensor" if sequence_parallel else "all_reduce"]

    def leaves() -> tuple[Tensor, Tensor]:
        x, w = hidden[mine].clone().requires_grad_(), weight[shard].clone().requires_grad_()
        if has_main_grad:
            w.main_grad = torch.zeros(w.shape)
        return x, w

    def check(x: Tensor, w: Tensor, log_probs: Tensor, entropy: Tensor) -> None:
        for got, wanted in [
            (log_probs, expected[0]),
            (entropy, expected[1]),
            (x.grad, expected[2][mine]),
            (w.main_grad if has_main_grad else w.grad, expected[3][shard]),
        ]:
            assert_near(got, wanted, TOLERANCE[dtype])
        assert_same_everywhere(torch.stack([log_probs.detach(), entropy.detach()]), world_size)

    x, w = leaves()
    calls.clear()
    log_probs, entropy = linear_log_probs(x, w, labels, **options)
    assert calls == [*gathers, "all_gather_into_tensor"]
    torch.autograd.backward([log_probs, entropy], tuple(upstream))
    assert calls[len(gathers) + 1 :] == [*gathers, *reduction]
    check(x, w, log_probs, entropy)

    x, w = leaves()
    calls.clear()
    loss, log_probs, entropy = linear_loss(
        x, w, labels, lambda lp, h, rows: lp * upstream[0, rows] + h * upstream[1, rows], **options
    )
    assert calls == [*gathers, *["all_gather_into_tensor"] * 3, *reduction]
    calls.clear()
    loss.backward()
    assert calls == []
    check(x, w, log_probs, entropy)
    assert_same_everywhere(loss.detach()[None], world_size)

    nothing = torch.full_like(labels, -100)  # the ranks still meet
    for run in (
        lambda: linear_log_probs(*leaves(), nothing, **options)[0].sum(),
        lambda: linear_loss(*leaves(), nothing, lambda lp, h, rows: lp, **options)[0],
    ):
        total = run()
        total.backward()
        assert float(total.detach()) == 0.0


def check_cases(rank: int, world_size: int, cases: list[tuple]) -> None:
    calls = count_collectives()
    linear.LEAST_COLUMNS, linear.TILE_BYTES = 64, 1024  # several tiles on each rank
    for case in cases:
        check_case(rank, world_size, calls, *case)


# Padding: none, a part of the last shard, all of the last and more.
@pytest.mark.parametrize(
    "world_size, cases",
    [
        (
            2,
            [
                (200, 400, torch.float32, False, False),
                (200, 390, torch.float32, True, True),
                (200, 150, torch.float32, False, True),
            ],
        ),
        (3, [(133, 390, torch.bfloat16, True, False), (133, 250, torch.float32, True, False)]),
    ],
)
def test_matches_dense(world_size: int, cases: list[tuple]) -> None:
    run_on_ranks(check_cases, world_size, cases)


def check_next_product_runs_before_the_wait(rank: int, world_size: int) -> None:
    """Order of events on one rank: the statistics of a chunk are on their way while the next logits are computed."""
    hidden, weight, labels, _ = make_case(world_size, 100, 200, torch.float32)
    events: list[str] = []
    original_gather, original_product = dist.all_gather_into_tensor, linear.LogitsBuffer.product

    class Noted:
        def __init__(self, work) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("wait")
            self.work.wait()

    def gather(*args, **kwargs) -> Noted:
        events.append("gather")
        return Noted(original_gather(*args, **kwargs))

    def product(*args) -> Tensor:
        events.append("logits")
        return original_product(*args)

    dist.all_gather_into_tensor, linear.LogitsBuffer.product = gather, product
    shard = weight[rank * 100 : (rank + 1) * 100]
    linear_loss(hidden, shard, labels, lambda lp, h, rows: lp, tp_group=dist.group.WORLD, chunk_tokens=4)
    assert events == ["logits", "gather", "logits", "gather", "wait", "logits", "gather", "wait", "wait"]


def test_statistics_travel_behind_the_next_product() -> None:
    run_on_ranks(check_next_product_runs_before_the_wait, 2)


def check_what_travels_is_contiguous(rank: int, world_size: int) -> None:
    """gloo sends any dense tensor; NCCL refuses what is not contiguous."""
    hidden, weight, labels, upstream = make_case(world_size, 100, 200, torch.float32)
    hidden, labels = hidden.nan_to_num(), labels.clamp(min=0)  # all rows count: none is copied
    expected = dense(hidden, weight, labels, upstream * torch.tensor([[1.0], [0.0]]), 200)[2]
    options = {"tp_group": dist.group.WORLD, "temperature": TEMPERATURE}
    original, strides = dist.all_reduce, []

    def all_reduce(tensor: Tensor, **arguments):
        strides.append(tensor.stride())
        return original(tensor, **arguments)

    dist.all_reduce = all_reduce
    shard = weight[rank * 100 : (rank + 1) * 100]
    for run in (
        lambda x: linear_loss(x, shard, labels, lambda lp, h, rows: lp * upstream[0, rows], **options)[0],
        lambda x: (linear_log_probs(x, shard, labels, **options)[0] * upstream[0]).sum(),
    ):
        x = hidden.t().contiguous().t().requires_grad_()
        run(x).backward()
        assert_near(x.grad, expected, 3e-6)
    assert strides == [(SIZE, 1)] * 2


def test_what_travels_is_contiguous() -> None:
    run_on_ranks(check_what_travels_is_contiguous, 2)
