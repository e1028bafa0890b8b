"""What linear_log_probs and linear_loss share: arguments, the rows that count, tiles of logits, exact sums, ranks.

When it pays. Logits cost tokens * v/p * 2 bytes in bf16, even where their gradient is written over them. linear_loss
holds 1024 rows of them (2048 with p > 1) and, without Megatron's main_grad, the weight's gradient in fp32;
linear_log_probs holds one tile, and computes it twice. Tokens that are ignored cost neither of them anything. So:

    less than about 2000 tokens that count, and few others    vocab_parallel_log_probs: nothing to gain
    training on Megatron's DDP                                linear_loss: no further arithmetic, bounded memory
    without main_grad, or with still less memory              linear_log_probs: a third more arithmetic in the head
    a loss that needs the statistics of all tokens first      linear_log_probs

Measured on one CPU thread at n = 2048, H = 896, v = 151936, bf16, forward and backward, peak memory beyond the
arguments and CPU seconds: F.cross_entropy((h @ W.T).float()) 3.48 GiB, 10.9; logits in place 0.84, 5.2; linear_loss
0.80 (0.29 with main_grad), 4.8 (4.2); linear_log_probs 0.38 (0.07 with main_grad), 5.4.

Shapes: n tokens that count of t, H hidden size, v vocabulary, p tensor-parallel size, w columns of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gft_megatron.ops.rows import check_labels, check_temperature, require_in_vocabulary, vocab_slice

TILE_BYTES = 64 * 2**20
"""Logits of a tile of linear_log_probs, and the fp32 sum of a tile's weight gradient."""
LEAST_COLUMNS = 1024
"""Narrower tiles would spend their time on adding up d hidden."""
_COLUMN_MULTIPLE = 64  # rows of a tile start at multiples of 128 bytes, and matrix products like it


@dataclass(frozen=True)
class VocabShard:
    """This rank's slice of the vocabulary, and how its logits are read."""

    vocab_start: int
    num_columns: int
    """Columns that exist; the padding behind them is never computed."""
    inv_temperature: float
    with_entropy: bool
    tp_group: dist.ProcessGroup | None
    """None: the only shard."""
    sequence_parallel: bool
    """hidden is this rank's part of the tokens. Never with tp_group None."""

    def statistics_arguments(self, start: int, width: int) -> tuple[int, int, float, bool]:
        return self.vocab_start + start, width, self.inv_temperature, self.with_entropy

    def gradient_arguments(self, start: int, width: int) -> tuple[int, int, float]:
        return self.vocab_start + start, width, self.inv_temperature


@dataclass(frozen=True)
class LiveTokens:
    """The tokens that count: the others never reach a matrix product."""

    positions: Tensor  # [n] int64, into the flattened labels
    labels: Tensor  # [n] int64
    num_all: int

    @property
    def is_all(self) -> bool:
        return len(self.positions) == self.num_all


def vocab_shard(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [v/p, H]
    labels: Tensor,  # [...]
    *,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    temperature: float,
    with_entropy: bool,
    vocab_size: int | None,
    chunk_tokens: int | None,
) -> tuple[VocabShard, int]:
    """This rank's shard and the vocabulary's true size, after a look at all arguments.

    Raises:
        ValueError: an argument of the wrong shape, dtype or range.
    """
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden and weight must both be float32, bfloat16 or float16, got {hidden.dtype} and {weight.dtype}; "
            f"cast one of them (autocast does not reach in here)"
        )
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or len(weight) == 0:
        raise ValueError(
            f"hidden must be [..., H] and weight [vocabulary / tensor-parallel size, H], "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    size = 1 if tp_group is None else dist.get_world_size(tp_group)
    is_split = sequence_parallel and size > 1
    check_labels(labels, (hidden.shape[0] * (size if is_split else 1), *hidden.shape[1:-1]), hidden.device)
    check_temperature(temperature)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    vocab_start, num_columns, vocab = vocab_slice(len(weight), vocab_size, tp_group)
    shard = VocabShard(
        vocab_start=vocab_start,
        num_columns=num_columns,
        inv_temperature=1.0 / temperature,
        with_entropy=with_entropy,
        tp_group=tp_group if size > 1 else None,
        sequence_parallel=is_split,
    )
    return shard, vocab


def live_tokens(labels: Tensor, ignore_index: int, vocab: int) -> LiveTokens:
    """Where the labels are that count. On CUDA the host waits: their number decides the shapes that follow.

    Raises:
        ValueError: a label outside the vocabulary, on CPU; on CUDA a device-side assertion stops the process.
    """
    flat = labels.reshape(-1)
    positions = (flat != ignore_index).nonzero()[:, 0]
    live = flat[positions]
    require_in_vocabulary(live, (live >= 0) & (live < vocab), vocab)
    return LiveTokens(positions, live, len(flat))


def live_hidden(hidden: Tensor, tokens: LiveTokens, shard: VocabShard) -> Tensor:  # -> [n, H]
    """The rows that count, of all ranks' tokens under sequence parallelism (one all-gather)."""
    if shard.sequence_parallel:
        size = dist.get_world_size(shard.tp_group)
        whole = hidden.new_empty((size * hidden.shape[0], *hidden.shape[1:]))
        dist.all_gather_into_tensor(whole, hidden.contiguous(), group=shard.tp_group)
        hidden = whole
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat if tokens.is_all else flat.index_select(0, tokens.positions)


def start_hidden_reduction(grad: Tensor, tokens: LiveTokens, shard: VocabShard) -> Callable[[], Tensor]:
    """Begin to sum d hidden [n, H] over the ranks. What is returned waits, and gives this rank's [t, H] (or [t/p, H]).

    The products that do not depend on it may run meanwhile.
    """
    if shard.tp_group is None:
        return lambda: _spread(grad, tokens)
    if not shard.sequence_parallel:
        work = dist.all_reduce(grad, group=shard.tp_group, async_op=True)

        def reduced() -> Tensor:
            work.wait()
            return _spread(grad, tokens)

        return reduced
    whole = _spread(grad, tokens)
    mine = whole.new_empty((len(whole) // dist.get_world_size(shard.tp_group), whole.shape[1]))
    work = dist.reduce_scatter_tensor(mine, whole, group=shard.tp_group, async_op=True)

    def scattered() -> Tensor:
        work.wait()
        return mine

    return scattered


def _spread(grad: Tensor, tokens: LiveTokens) -> Tensor:  # [n, H] -> [t, H]
    if tokens.is_all:
        return grad
    return grad.new_zeros((tokens.num_all, grad.shape[1])).index_copy_(0, tokens.positions, grad)


class LogitsBuffer:
    """Memory for one tile of logits, used again and again."""

    def __init__(self, like: Tensor, rows: int, columns: int) -> None:
        self._memory = like.new_empty((rows, -(-columns // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE))

    def product(self, hidden: Tensor, weight: Tensor) -> Tensor:  # [m, H], [w, H] -> [m, w]
        logits = self._memory[: len(hidden), : len(weight)]
        return torch.mm(hidden, weight.t(), out=logits)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:  # [i, j] fp32 += [i, k] @ [k, j]
    """Add a product in fp32. On CPU one of 16-bit matrices is rounded before it is added: no fp32 comes out of it."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
        return
    # A part at a time: no second matrix of the total's size, and on CPU one that stays in the cache.
    product_bytes, options = (TILE_BYTES, {"out_dtype": torch.float32}) if a.is_cuda else (TILE_BYTES // 16, {})
    for rows in spans(len(total), max(product_bytes // (4 * b.shape[1]), 1)):
        total[rows].add_(torch.mm(a[rows], b, **options))


def spans(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def column_spans(num_rows: int, shard: VocabShard, hidden: Tensor) -> list[slice]:
    """The tiles of a shard: neither the logits of `num_rows` rows nor an fp32 gradient of the tile's weights takes more
    than TILE_BYTES, unless LEAST_COLUMNS do."""
    bytes_per_column = max(num_rows * hidden.element_size(), 4 * hidden.shape[-1])
    width = max(TILE_BYTES // bytes_per_column, LEAST_COLUMNS)
    return list(spans(shard.num_columns, -(-width // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE))


def main_grad_of(weight: Tensor) -> Tensor | None:
    """Megatron's fp32 sum of this weight's gradients, where it has one.

    Raises:
        ValueError: it is not fp32, and sums of many small products would be rounded many times.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is not None and main_grad.dtype != torch.float32:
        raise ValueError(f"main_grad must be float32, got {main_grad.dtype}; set grad_reduce_in_fp32 in Megatron's DDP")
    return main_grad


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast would turn the operands of a product into another dtype than the memory that is to hold it."""
    return torch.autocast(tensor.device.type, enabled=False)
