"""The compiled operators once more in plain PyTorch and float64: same arguments, same answers, no speed.

The contract (what the columns mean, ignored rows, labels of other shards) is written down in csrc/rows.h and
csrc/segments.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOT_OWNED = float("inf")


def _scaled(logits: Tensor, valid_vocab: int, inv_temperature: float) -> Tensor:  # [n, v/p] -> [n, valid] fp64
    return logits[:, :valid_vocab].double() * inv_temperature


def _below_max(logits: Tensor, valid_vocab: int, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """The maximum of each row [n] fp32, and its elements relative to that [n, valid] fp64."""
    x = _scaled(logits, valid_vocab, inv_temperature)
    if valid_vocab == 0:
        return x.new_full((len(x),), float("-inf"), dtype=torch.float32), x
    maximum = x.amax(-1).float()
    return maximum, x - torch.where(maximum.isneginf(), 0.0, maximum).double()[:, None]


def _label_columns(labels: Tensor, vocab_start: int, valid_vocab: int) -> tuple[Tensor, Tensor]:
    """Rows whose label lies in this shard, and the columns there; int64, of equal length."""
    columns = labels - vocab_start
    rows = ((labels >= 0) & (columns >= 0) & (columns < valid_vocab)).nonzero()[:, 0]
    return rows, columns[rows]


def row_stats(
    logits: Tensor, labels: Tensor, vocab_start: int, valid_vocab: int, inv_temperature: float, want_entropy: bool
) -> Tensor:
    """[n, v/p] -> [n, 4] fp32: max, sum exp, sum exp * (x - max), label - max."""
    maximum, delta = _below_max(logits, valid_vocab, inv_temperature)
    e = delta.exp()
    weighted = torch.where(e > 0, e * delta, e).sum(-1) if want_entropy else torch.full_like(maximum, float("nan"))
    label = torch.full_like(maximum, NOT_OWNED)
    rows, columns = _label_columns(labels, vocab_start, valid_vocab)
    label[rows] = delta[rows, columns].float()
    stats = torch.stack([maximum, e.sum(-1).float(), weighted.float(), label], dim=-1)
    ignored = [0.0, 1.0, 0.0, 0.0] if vocab_start == 0 else [float("-inf"), 0.0, 0.0, NOT_OWNED]
    return torch.where((labels < 0)[:, None], stats.new_tensor(ignored), stats)


def merge_stats(stats: Tensor) -> Tensor:
    """Parts of one shard [num_parts, n, 4] -> [n, 4] fp32."""
    return torch.stack(_merged(stats), dim=-1).float()


def _merged(stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [p, n, 4] -> four [n] fp64
    maxima, sums, weighted, labels = stats.double().unbind(-1)  # [p, n]
    maximum = maxima.amax(0)
    delta = torch.where(maxima.isneginf(), 0.0, maxima) - torch.where(maximum.isneginf(), 0.0, maximum)
    scale = torch.where(sums == 0, 0.0, delta.exp())
    moved = torch.where(scale == 0, 0.0 * sums, scale * (weighted + sums * delta))
    owned = labels != NOT_OWNED
    label = torch.where(owned, labels + delta, 0.0).sum(0).where(owned.any(0), NOT_OWNED)
    return maximum, (sums * scale).sum(0), moved.sum(0), label


def combine_stats(stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[p, n, 4] -> log_prob, entropy, max, log_sum, each [n] fp32."""
    maximum, total, weighted, label = _merged(stats)
    log_sum = total.log()
    log_prob = torch.where(label == NOT_OWNED, float("nan"), label - log_sum)
    entropy = (log_sum - weighted / total).clamp(min=0)
    shift = torch.where(maximum.isneginf(), 0.0, maximum)
    return log_prob.float(), entropy.float(), shift.float(), log_sum.float()


def row_grad_(
    logits: Tensor,
    grad: Tensor,
    labels: Tensor,
    vocab_start: int,
    valid_vocab: int,
    inv_temperature: float,
    max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_log_prob: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """Write the gradient [n, v/p] into `grad`, which may be `logits`."""
    x = _scaled(logits, valid_vocab, inv_temperature)
    log_probs = x - max.double()[:, None] - log_sum.double()[:, None]
    probs = log_probs.exp()
    factor = -grad_log_prob.double()[:, None]
    dead = (labels < 0) | (grad_log_prob == 0)
    if grad_entropy is not None:
        spread = grad_entropy.double()[:, None] * (log_probs + entropy.double()[:, None])
        # No entropy was asked for: it is NaN, and the gradient into it 0.
        factor = factor - torch.where((probs == 0) | (grad_entropy == 0)[:, None], 0.0, spread)
        dead = dead & ((grad_entropy == 0) | (labels < 0))
    result = probs * factor
    rows, columns = _label_columns(labels, vocab_start, valid_vocab)
    result[rows, columns] += grad_log_prob[rows].double()
    result = torch.where(dead[:, None], 0.0, result * inv_temperature)
    grad[:, :valid_vocab].copy_(result)
    grad[:, valid_vocab:].zero_()


def rectified_sweep_(
    logits: Tensor,
    grad: Tensor,
    labels: Tensor,
    valid_vocab: int,
    inv_temperature: float,
    weight: Tensor,
    tau: Tensor,
) -> Tensor:
    """Write the gradient of -weight c log p [n, v] into `grad`, which may be `logits` -> log p [n]."""
    place = (0, valid_vocab, inv_temperature)
    stats = row_stats(logits, labels, *place, False)
    log_prob, entropy, maximum, log_sum = combine_stats(stats[None])
    prob = log_prob.double().exp()
    upstream = -weight * torch.where(prob < tau, prob, 1.0).float()
    row_grad_(logits, grad, labels, *place, maximum, log_sum, entropy, upstream, None)
    return log_prob


def _kl_block(logits: Tensor) -> int:
    """Rows at a time, so that a temporary has 32 MiB: the KL is what CUDA runs, too."""
    return max(1, 2**22 // logits.shape[1])


def kl_stats(logits: Tensor, ref_logits: Tensor, labels: Tensor, valid_vocab: int, inv_temperature: float) -> Tensor:
    """[n, v/p] twice -> [n, 5] fp64: max, sum exp, reference's max, its sum exp, sum of its exp * difference."""
    stats = logits.new_empty((len(logits), 5), dtype=torch.float64)
    rows = _kl_block(logits)
    for part, ref_part, out in zip(logits.split(rows), ref_logits.split(rows), stats.split(rows), strict=True):
        maximum, delta = _below_max(part, valid_vocab, inv_temperature)
        ref_maximum, ref_delta = _below_max(ref_part, valid_vocab, inv_temperature)
        e, ref_e = delta.exp(), ref_delta.exp()
        weighted = torch.where(ref_e == 0, 0.0, ref_e * (ref_delta - delta))
        columns = (maximum.double(), e.sum(-1), ref_maximum.double(), ref_e.sum(-1), weighted.sum(-1))
        out.copy_(torch.stack(columns, dim=-1))
    return torch.where((labels < 0)[:, None], stats.new_tensor([0.0, 1.0, 0.0, 1.0, 0.0]), stats)


def kl_grad_(
    logits: Tensor,
    ref_logits: Tensor,
    grad: Tensor,
    labels: Tensor,
    valid_vocab: int,
    inv_temperature: float,
    max: Tensor,
    log_sum: Tensor,
    ref_max: Tensor,
    ref_log_sum: Tensor,
    grad_kl: Tensor,
) -> None:
    """Write (p - q) * grad_kl * inv_temperature [n, v/p] into `grad`."""
    dead = ((labels < 0) | (grad_kl == 0))[:, None]
    factor = (grad_kl.double() * inv_temperature)[:, None]
    rows = _kl_block(logits)
    shifts = (vector.double()[:, None].split(rows) for vector in (max, log_sum, ref_max, ref_log_sum))
    matrices = (matrix.split(rows) for matrix in (logits, ref_logits, grad, dead, factor))
    for part, ref_part, out, off, scale, m, s, ref_m, ref_s in zip(*matrices, *shifts, strict=True):
        probs = (_scaled(part, valid_vocab, inv_temperature) - m - s).exp()
        ref_probs = (_scaled(ref_part, valid_vocab, inv_temperature) - ref_m - ref_s).exp()
        out[:, :valid_vocab].copy_(torch.where(off, 0.0, (probs - ref_probs) * scale))
        out[:, valid_vocab:].zero_()


def segment_sums(values: Tensor, mask: Tensor | None, segment_ids: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """[n] -> sums and numbers of unmasked values, each [num_segments] fp32."""
    live = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    zeros = torch.zeros(num_segments, dtype=torch.float64, device=values.device)
    sums = zeros.index_add(0, segment_ids, values.double().where(live, 0.0))
    return sums.float(), zeros.index_add(0, segment_ids, live.double()).float()


def group_advantages(rewards: Tensor, group_ids: Tensor, divide_by_deviation: bool, ddof: int, eps: float) -> Tensor:
    """[n] fp64 -> [n] fp32, see gft_megatron.advantages."""
    _, group = group_ids.unique(return_inverse=True)  # [n] in 0..num_groups-1
    size = torch.bincount(group)  # [num_groups]

    def mean_of(x: Tensor, divisor: Tensor) -> Tensor:
        return torch.zeros(len(size), dtype=x.dtype, device=x.device).index_add_(0, group, x) / divisor

    centred = rewards - mean_of(rewards, size)[group]
    lowest = torch.full((len(size),), torch.inf, dtype=rewards.dtype, device=rewards.device)
    highest = -lowest
    lowest = lowest.scatter_reduce(0, group, rewards, "amin")
    highest = highest.scatter_reduce(0, group, rewards, "amax")
    # Rounding of the mean leaves residues of 1e-17 in a group of equal rewards, which eps does not tame when it is 0.
    centred = torch.where((lowest == highest)[group], 0.0, centred)
    if divide_by_deviation:
        variance = mean_of(centred.square(), (size - ddof).clamp(min=1))
        centred = centred / (variance.sqrt() + eps)[group]
        centred = torch.nan_to_num(centred, nan=0.0)  # 0 / 0 where eps is 0 and the rewards are equal
    return torch.where((size == 1)[group], rewards, centred).float()
