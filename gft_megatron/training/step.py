"""One optimizer step through Megatron's pipeline schedules, and a forward-only pass for log-probs.

Only the last pipeline stage sees logits, or the hidden states that they are made of (--fused-linear-loss). It computes
the loss of each packed micro-batch; Megatron sums gradients and token counts over micro-batches, context-parallel and
data-parallel ranks, and divides once.

Legend: t tokens of a micro-batch on this context-parallel rank, v/p vocabulary shard of this tensor-parallel rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from gft_megatron.data.packing import PackedMicroBatch
from gft_megatron.losses import LossFn, LossInputs, is_token_local
from gft_megatron.losses.reduce import token_sum
from gft_megatron.ops import linear_log_probs, linear_loss, vocab_parallel_log_probs
from gft_megatron.training.fused_linear import output_weight, with_weight_gradient
from gft_megatron.training.parallel import is_last_stage


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a step minimises."""

    loss: LossFn
    hyper: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    """Log-probs are those of softmax(logits / temperature), as the samples were drawn."""
    vocab_size: int
    """True size; the padding of the last shard takes no part."""
    fused_linear_loss: bool = False
    """The last stage gives hidden states (`fused_linear.return_hidden_states`), and logits are never held."""


@dataclass(frozen=True)
class StepResult:
    """Metrics of the global batch, equal on every rank, and where the time went."""

    metrics: dict[str, float]
    num_tokens: int
    lr: float
    forward_backward_sec: float
    optimizer_sec: float


Chunks = list[DistributedDataParallel]
_Item = tuple[PackedMicroBatch, Tensor | None]
_LossFunc = Callable[[Tensor, _Item, DistributedDataParallel], tuple[Tensor, Tensor, dict[str, Tensor]]]


def train_step(
    chunks: Chunks,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    micro_batches: Sequence[PackedMicroBatch],
    objective: Objective,
    *,
    old_log_probs: Sequence[Tensor] | None = None,
) -> StepResult:
    """Forward and backward over this replica's micro-batches, then one clipped AdamW step.

    Args:
        micro_batches: all of the same padded length; as many on every replica.
        old_log_probs: for each micro-batch [t], as `forward_log_probs` gave them; only the last stage reads them. None:
            the policy that drew the samples is the one being updated.

    Raises:
        FloatingPointError: the loss or a gradient is not finite. Raised before the optimizer step.
    """
    started = time.perf_counter()
    try:
        metrics, num_tokens = forward_backward(chunks, optimizer, micro_batches, objective, old_log_probs=old_log_probs)
    except RuntimeError as error:
        # distributed/param_and_grad_buffer.py, check_grads: a local gradient norm that is NaN or infinite.
        if "Unexpected result" not in str(error):
            raise
        raise FloatingPointError("a gradient of this step is not finite, no weight was changed") from error
    if not all(map(math.isfinite, metrics.values())):
        raise FloatingPointError(f"the loss of this step is not finite, no weight was changed: {metrics}")
    computed = time.perf_counter()
    lr = optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = optimizer.step()
    scheduler.step(increment=1)
    metrics["grad_norm"] = float(grad_norm)
    return StepResult(metrics, num_tokens, lr, computed - started, time.perf_counter() - computed)


def forward_backward(
    chunks: Chunks,
    optimizer: MegatronOptimizer,
    micro_batches: Sequence[PackedMicroBatch],
    objective: Objective,
    *,
    old_log_probs: Sequence[Tensor] | None = None,
) -> tuple[dict[str, float], int]:
    """Leave the gradient of the global batch in `main_grad`; return its metrics and number of response tokens."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    # What the schedule multiplies the loss with before it calls backward. Only linear_loss has to know it in advance.
    grad_scale = 1.0
    if objective.fused_linear_loss:
        grad_scale = float(optimizer.scale_loss(torch.ones((), device=torch.cuda.current_device())))
    olds = [None] * len(micro_batches) if old_log_probs is None else old_log_probs
    reports = _run_schedule(
        chunks,
        list(zip(micro_batches, olds, strict=True)),
        lambda output, item, chunk: _loss(output, *item, objective, chunk, grad_scale),
        forward_only=False,
    )
    sums = _sum_over_replicas(reports)
    num_tokens, gap_tokens, gap = (sums.pop(name) for name in ("num_tokens", "gap_tokens", "log_prob_gap_mean"))
    metrics = {name: value / max(num_tokens, 1.0) for name, value in sums.items()}
    if gap_tokens:
        metrics["log_prob_gap_mean"] = gap / gap_tokens
    return metrics, int(num_tokens)


def forward_log_probs(
    chunks: Chunks, micro_batches: Sequence[PackedMicroBatch], objective: Objective
) -> list[Tensor] | None:
    """Log-probs [t] of each micro-batch under the present weights, by the same schedule; None but on the last stage."""

    def loss_func(
        output: Tensor, item: _Item, chunk: DistributedDataParallel
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        micro_batch, _ = item
        log_probs, _ = _log_probs(output, micro_batch, objective, chunk)
        count = micro_batch.mask.sum().int()
        return log_probs.sum(), count.to(log_probs.device), {"log_probs": log_probs.detach()}

    items: list[_Item] = [(micro_batch, None) for micro_batch in micro_batches]
    with torch.no_grad():  # forward_only alone still records the graph
        reports = _run_schedule(chunks, items, loss_func, forward_only=True)
    return [report["log_probs"] for report in reports] if is_last_stage() else None


def _run_schedule(
    chunks: Chunks,
    items: list[_Item],
    loss_func: _LossFunc,
    *,
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    """What `loss_func` reported for each micro-batch, in order; empty but on the last stage."""

    def forward_step(iterator: Iterator[_Item], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        item = next(iterator)
        return _forward(chunk, item[0]), lambda output: loss_func(output, item, chunk)

    iterators = [iter(items) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(items),
        seq_length=items[0][0].length,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _forward(chunk: torch.nn.Module, micro_batch: PackedMicroBatch) -> Tensor:
    """Logits [1, t, v/p] or hidden states [1, t, h] of the last stage, [t, 1, h] between stages; t/p of them under
    sequence parallelism, but all logits."""
    device = torch.cuda.current_device()
    cu_seqlens = micro_batch.cu_seqlens.to(device)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=micro_batch.max_seqlen,
        max_seqlen_kv=micro_batch.max_seqlen,
    )
    # Float16Module would copy the logits to fp32: a second tensor of [tokens, vocabulary].
    options = {"fp32_output": False} if chunk.config.bf16 else {}
    return chunk(
        input_ids=micro_batch.tokens.to(device)[None],
        position_ids=micro_batch.position_ids.to(device)[None],
        attention_mask=None,
        packed_seq_params=packed,
        **options,
    )


def _log_probs(
    output: Tensor, micro_batch: PackedMicroBatch, objective: Objective, chunk: DistributedDataParallel
) -> tuple[Tensor, Tensor]:  # [t], [t]
    labels = micro_batch.labels.to(output.device)
    if objective.fused_linear_loss:
        log_probs, entropy = linear_log_probs(
            output[0], output_weight(chunk), labels, **_linear_options(objective, chunk)
        )
    else:
        log_probs, entropy = vocab_parallel_log_probs(
            output[0],
            labels,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            temperature=objective.temperature,
            with_entropy=True,
            inplace_backward=torch.is_grad_enabled(),
            vocab_size=objective.vocab_size,
        )
    assert entropy is not None
    return log_probs, entropy


def _linear_options(objective: Objective, chunk: DistributedDataParallel) -> dict[str, Any]:
    return {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "sequence_parallel": chunk.config.sequence_parallel,
        "temperature": objective.temperature,
        "with_entropy": True,
        "vocab_size": objective.vocab_size,
    }


def _loss(
    output: Tensor,  # [1, t, v/p] logits, or hidden states [1, t, h]
    micro_batch: PackedMicroBatch,
    old_log_probs: Tensor | None,
    objective: Objective,
    chunk: DistributedDataParallel,
    grad_scale: float,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    device = output.device
    mask = micro_batch.mask.to(device)
    inputs = LossInputs(
        log_probs=torch.zeros(mask.shape, device=device),  # of each token, once it is known
        mask=mask,
        sequence_ids=micro_batch.sequence_ids.to(device),
        group_ids=micro_batch.group_ids.to(device),
        sources=micro_batch.sources.to(device),
        advantages=micro_batch.advantages.to(device),
        old_log_probs=old_log_probs,
        rollout_log_probs=micro_batch.rollout_log_probs.to(device),
        token_groups=micro_batch.token_groups.to(device),
    )
    if objective.fused_linear_loss and is_token_local(objective.loss):
        loss, log_probs, entropy, metric_sums = _chunked_loss(
            output, micro_batch.labels.to(device), inputs, objective, chunk, grad_scale
        )
        num_tokens = mask.sum().int()
    else:
        log_probs, entropy = _log_probs(output, micro_batch, objective, chunk)
        per_token_loss, metrics = objective.loss(inputs.with_policy(log_probs, entropy), **objective.hyper)
        loss, num_tokens = token_sum(per_token_loss, mask)
        metric_sums = {name: value * num_tokens for name, value in metrics.items()}
    if objective.fused_linear_loss:
        loss = with_weight_gradient(loss, chunk)
    sampled = mask & ~inputs.rollout_log_probs.isnan()
    gap = (log_probs.detach() - inputs.rollout_log_probs).abs().where(sampled, 0.0)
    report = {
        "loss": loss.detach(),
        "nll": -log_probs.detach().where(mask, 0.0).sum(),
        "entropy_mean": entropy.detach().where(mask, 0.0).sum(),
        "log_prob_gap_mean": gap.sum(),
        "gap_tokens": sampled.sum().float(),
        "num_tokens": num_tokens.float(),
        **metric_sums,
    }
    return loss, num_tokens, report


def _chunked_loss(
    hidden: Tensor,  # [1, t, h]
    labels: Tensor,  # [t]
    inputs: LossInputs,
    objective: Objective,
    chunk: DistributedDataParallel,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # [], [t], [t]
    """The loss of tokens that do not need each other, and the sums over tokens of its metrics."""
    metric_sums: dict[str, Tensor] = {}

    def token_loss(log_probs: Tensor, entropy: Tensor | None, positions: Tensor) -> Tensor:
        per_token_loss, metrics = objective.loss(
            inputs.at(positions).with_policy(log_probs, entropy), **objective.hyper
        )
        for name, mean in metrics.items():
            metric_sums[name] = metric_sums.get(name, 0.0) + mean * len(positions)
        return per_token_loss

    loss, log_probs, entropy = linear_loss(
        hidden[0],
        output_weight(chunk),
        labels,
        token_loss,
        grad_scale=grad_scale,
        **_linear_options(objective, chunk),
    )
    assert entropy is not None
    return loss, log_probs, entropy, metric_sums


def _sum_over_replicas(reports: list[dict[str, Tensor]]) -> dict[str, float]:
    """Add up the reports of all micro-batches on the last stages and tell every rank."""
    names = [sorted(reports[0])] if is_last_stage() else [None]
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    if pipeline.size() > 1:
        dist.broadcast_object_list(names, src=last, group=pipeline)
    device = torch.cuda.current_device()
    sums = torch.zeros(len(names[0]), dtype=torch.float64, device=device)
    if is_last_stage():
        for report in reports:
            sums += torch.stack([report[name].double() for name in names[0]])
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if pipeline.size() > 1:
        dist.broadcast(sums, src=last, group=pipeline)
    return dict(zip(names[0], sums.tolist(), strict=True))
