"""One optimizer step: the loss of each packed micro-batch on the last pipeline stage, backward, AdamW.

Megatron sums gradients and token counts over micro-batches, context-parallel and data-parallel ranks, and divides once.

Legend: t tokens of a micro-batch on this context-parallel rank, v/p vocabulary shard of this tensor-parallel rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from gft_megatron.data.packing import PackedMicroBatch
from gft_megatron.losses import (
    LossFn,
    LossInputs,
    batch_sums,
    batch_sums_of_policy,
    is_token_local,
    required_inputs,
)
from gft_megatron.losses.eaft import TOP_K
from gft_megatron.losses.reduce import token_sum
from gft_megatron.ops import (
    linear_log_probs,
    linear_loss,
    vocab_parallel_kl,
    vocab_parallel_log_probs,
    vocab_parallel_top_entropy,
)
from gft_megatron.training.fused_linear import output_weight, with_weight_gradient
from gft_megatron.training.parallel import is_last_stage
from gft_megatron.training.passes import Chunks, Report, run_schedule, sum_over_replicas


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a step minimises."""

    loss: LossFn
    hyper: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    """Log-probs are those of softmax(logits / temperature), as the samples were drawn."""
    vocab_size: int
    """True size; the padding of the last shard takes no part."""
    tells_batch_sums: bool = False
    """Take the sums of the batch in this pass too, for the step after it."""
    fused_linear_loss: bool = False
    """The last stage gives hidden states (`fused_linear.return_hidden_states`), and logits are never held."""


@dataclass(frozen=True)
class StepInput:
    """A micro-batch, and what forward-only passes said of it: on the last stage only, and only if the loss reads it."""

    micro_batch: PackedMicroBatch
    old_log_probs: Tensor | None = None  # [t]; None: the policy that drew the samples is the one being updated
    ref_log_probs: Tensor | None = None  # [t]
    ref_logits: Callable[[], Tensor] | None = None  # -> [t, v/p], computed when asked for


@dataclass(frozen=True)
class BatchFigures:
    """What a pass told of the global batch, under the weights that it ran with; equal on every rank."""

    metrics: dict[str, float]
    num_tokens: int
    sums: dict[str, Tensor] | None
    """What the loss's `batch_sums` said; None unless the objective tells them."""
    sample_nll: Tensor
    """[samples of the batch] fp64: mean negative log-likelihood of each response."""


@dataclass(frozen=True)
class StepResult:
    """What a step told of its batch, under the weights before it, and where the time went."""

    figures: BatchFigures
    lr: float
    forward_backward_sec: float
    optimizer_sec: float


def train_step(
    chunks: Chunks,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    inputs: Sequence[StepInput],
    objective: Objective,
    *,
    batch: Mapping[str, Tensor] | None = None,
) -> StepResult:
    """Forward and backward over this replica's micro-batches, then one clipped AdamW step.

    Args:
        inputs: all of the same padded length; as many on every replica.
        batch: sums over the global batch that the loss is to read; None: take them in a forward-only pass first.

    Raises:
        FloatingPointError: the loss or a gradient is not finite. Raised before the optimizer step.
    """
    started = time.perf_counter()
    try:
        figures = forward_backward(chunks, optimizer, inputs, objective, batch=batch)
    except RuntimeError as error:
        # distributed/param_and_grad_buffer.py, check_grads: a local gradient norm that is NaN or infinite.
        if "Unexpected result" not in str(error):
            raise
        raise FloatingPointError("a gradient of this step is not finite, no weight was changed") from error
    metrics = figures.metrics
    if not all(map(math.isfinite, metrics.values())):
        raise FloatingPointError(f"the loss of this step is not finite, no weight was changed: {metrics}")
    computed = time.perf_counter()
    lr = optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = optimizer.step()
    scheduler.step(increment=1)
    metrics["grad_norm"] = float(grad_norm)
    return StepResult(figures, lr, computed - started, time.perf_counter() - computed)


def forward_backward(
    chunks: Chunks,
    optimizer: MegatronOptimizer,
    inputs: Sequence[StepInput],
    objective: Objective,
    *,
    batch: Mapping[str, Tensor] | None = None,
) -> BatchFigures:
    """Leave the gradient of the global batch in `main_grad`."""
    if batch is None and batch_sums(objective.loss) is not None:
        batch = forward_batch_sums(chunks, inputs, objective)
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
    reports = run_schedule(
        chunks,
        inputs,
        lambda output, item, chunk: _loss(output, item, objective, batch, chunk, grad_scale),
        forward_only=False,
    )
    return _figures(sum_over_replicas(reports), inputs)


# (output of the last stage, item, log-probs [t], entropy [t]) -> what to report
Tell = Callable[[Tensor, StepInput, Tensor, Tensor], Report]


def forward_only(chunks: Chunks, inputs: Sequence[StepInput], objective: Objective, tell: Tell) -> list[Report]:
    """What `tell` says of each micro-batch under the present weights, in order; empty but on the last stage."""

    def loss_func(output: Tensor, item: StepInput, chunk: DistributedDataParallel) -> tuple[Tensor, Tensor, Report]:
        log_probs, entropy = token_log_probs(output, item.micro_batch, objective, chunk)
        count = item.micro_batch.mask.sum().int().to(log_probs.device)
        return log_probs.sum(), count, tell(output, item, log_probs, entropy)

    return run_schedule(chunks, inputs, loss_func, forward_only=True)


def forward_log_probs(chunks: Chunks, inputs: Sequence[StepInput], objective: Objective) -> list[Tensor] | None:
    """Log-probs [t] of each micro-batch under the present weights; None but on the last stage."""
    reports = forward_only(chunks, inputs, objective, lambda _, __, log_probs, ___: {"log_probs": log_probs})
    return [report["log_probs"] for report in reports] or None


def forward_batch_sums(chunks: Chunks, inputs: Sequence[StepInput], objective: Objective) -> dict[str, Tensor]:
    """The sums over the global batch that the loss reads, under the present weights; equal on every rank."""
    sums = batch_sums(objective.loss)
    assert sums is not None
    if not batch_sums_of_policy(objective.loss):
        device = torch.cuda.current_device()
        counted = [_once(sums(known_inputs(item, device, None))) for item in inputs]
        return sum_over_replicas(counted if is_last_stage() else [])

    def tell(output: Tensor, item: StepInput, log_probs: Tensor, entropy: Tensor) -> Report:
        return _once(sums(known_inputs(item, output.device, None).with_policy(log_probs, entropy)))

    return sum_over_replicas(forward_only(chunks, inputs, objective, tell))


def _once(sums: Report) -> Report:
    """Whole sequences are counted on each of their context-parallel ranks, all of which are added up."""
    size = parallel_state.get_context_parallel_world_size()
    return {name: value.double() / size for name, value in sums.items()}


def token_log_probs(
    output: Tensor,  # [1, t, v/p] logits, or hidden states [1, t, h]
    micro_batch: PackedMicroBatch,
    objective: Objective,
    chunk: DistributedDataParallel,
) -> tuple[Tensor, Tensor]:  # [t], [t]
    """log p of each label, and the entropy, under the present weights; 0 where nothing is learned."""
    labels = micro_batch.labels.to(output.device)
    if objective.fused_linear_loss:
        log_probs, entropy = linear_log_probs(
            output[0], output_weight(chunk), labels, **linear_options(objective, chunk)
        )
    else:
        log_probs, entropy = vocab_parallel_log_probs(
            output[0],
            labels,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            temperature=objective.temperature,
            with_entropy=True,
            # The divergence reads the logits in its own backward.
            inplace_backward=torch.is_grad_enabled() and "ref_kl" not in required_inputs(objective.loss),
            vocab_size=objective.vocab_size,
        )
    assert entropy is not None
    return log_probs, entropy


def linear_options(objective: Objective, chunk: DistributedDataParallel) -> dict[str, Any]:
    """How the linear operators are to take this chunk's output layer."""
    return {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "sequence_parallel": chunk.config.sequence_parallel,
        "temperature": objective.temperature,
        "with_entropy": True,
        "vocab_size": objective.vocab_size,
    }


def known_inputs(item: StepInput, device: torch.device | int, batch: Mapping[str, Tensor] | None) -> LossInputs:
    """What the loss reads, but for what the policy says."""
    micro_batch = item.micro_batch
    mask = micro_batch.mask.to(device)
    return LossInputs(
        log_probs=torch.zeros(mask.shape, device=device),  # of each token, once it is known
        mask=mask,
        sequence_ids=micro_batch.sequence_ids.to(device),
        group_ids=micro_batch.group_ids.to(device),
        sources=micro_batch.sources.to(device),
        advantages=micro_batch.advantages.to(device),
        old_log_probs=item.old_log_probs,
        ref_log_probs=item.ref_log_probs,
        rollout_log_probs=micro_batch.rollout_log_probs.to(device),
        token_groups=micro_batch.token_groups.to(device),
        batch=batch,
        context_sum=_context_sum if parallel_state.get_context_parallel_world_size() > 1 else None,
    )


def _context_sum(values: Tensor) -> Tensor:
    total = values.clone()
    dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return total


def _loss(
    output: Tensor,  # [1, t, v/p] logits, or hidden states [1, t, h]
    item: StepInput,
    objective: Objective,
    batch: Mapping[str, Tensor] | None,
    chunk: DistributedDataParallel,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Report]:
    known = known_inputs(item, output.device, batch)
    weights = item.micro_batch.weights.to(output.device)[known.sequence_ids]  # [t]
    mask = known.mask.bool()
    if objective.fused_linear_loss and is_token_local(objective.loss):
        labels = item.micro_batch.labels.to(output.device)
        loss, log_probs, entropy, metric_sums = _chunked_loss(
            output, labels, known, weights, objective, chunk, grad_scale
        )
        num_tokens = mask.sum().int()
    else:
        log_probs, entropy = token_log_probs(output, item.micro_batch, objective, chunk)
        policy = known.with_policy(log_probs, entropy)
        if item.ref_logits is not None:
            policy = policy.with_ref_kl(_divergence(output, item, objective))
        if "top_entropy" in required_inputs(objective.loss):
            policy = policy.with_top_entropy(_top_entropy(output, objective))
        per_token_loss, metrics = objective.loss(policy, **objective.hyper)
        loss, num_tokens = token_sum(weights * per_token_loss, mask)
        metric_sums = {name: value * num_tokens for name, value in metrics.items()}
    if objective.fused_linear_loss:
        loss = with_weight_gradient(loss, chunk)
    log_probs, entropy = log_probs.detach(), entropy.detach()
    sums = batch_sums(objective.loss)
    sampled = mask & ~known.rollout_log_probs.isnan()
    gap = (log_probs - known.rollout_log_probs).abs().where(sampled, 0.0)
    report = {
        "loss": loss.detach(),
        "nll": -log_probs.where(mask, 0.0).sum(),
        "entropy_mean": entropy.where(mask, 0.0).sum(),
        "log_prob_gap_mean": gap.sum(),
        "gap_tokens": sampled.sum().float(),
        "num_tokens": num_tokens.float(),
        **metric_sums,
        _SAMPLE_NLL: sample_sums(-log_probs.where(mask, 0.0), item.micro_batch),
    }
    if sums is not None and objective.tells_batch_sums:
        of_batch = _once(sums(known.with_policy(log_probs, entropy)))
        report |= {_BATCH + name: value for name, value in of_batch.items()}
    return loss, num_tokens, report


_BATCH = "batch/"
_SAMPLE_NLL = "sample_nll"


def sample_sums(values: Tensor, micro_batch: PackedMicroBatch) -> Tensor:  # [t] -> [samples of the batch] fp64
    """Sums over the tokens of each sample, at its place in the batch."""
    of_token = micro_batch.sample_ids[micro_batch.sequence_ids].to(values.device)
    sums = torch.zeros(len(micro_batch.response_lengths), dtype=torch.float64, device=values.device)
    return sums.index_add_(0, of_token, values.double())


def _divergence(output: Tensor, item: StepInput, objective: Objective) -> Tensor:  # [1, t, v/p] -> [t]
    assert item.ref_logits is not None
    return vocab_parallel_kl(
        output[0],
        item.ref_logits(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        temperature=objective.temperature,
        labels=item.micro_batch.labels.to(output.device),
        vocab_size=objective.vocab_size,
    )


def _top_entropy(output: Tensor, objective: Objective) -> Tensor:  # [1, t, v/p] -> [t]
    return vocab_parallel_top_entropy(
        output[0],
        top_k=TOP_K,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        temperature=objective.temperature,
        vocab_size=objective.vocab_size,
    )


def _chunked_loss(
    hidden: Tensor,  # [1, t, h]
    labels: Tensor,  # [t]
    inputs: LossInputs,
    weights: Tensor,  # [t]
    objective: Objective,
    chunk: DistributedDataParallel,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Report]:  # [], [t], [t]
    """The loss of tokens that do not need each other, and the sums over tokens of its metrics."""
    metric_sums: Report = {}

    def token_loss(log_probs: Tensor, entropy: Tensor | None, positions: Tensor) -> Tensor:
        per_token_loss, metrics = objective.loss(
            inputs.at(positions).with_policy(log_probs, entropy), **objective.hyper
        )
        for name, mean in metrics.items():
            metric_sums[name] = metric_sums.get(name, 0.0) + mean * len(positions)
        return weights[positions] * per_token_loss

    loss, log_probs, entropy = linear_loss(
        hidden[0],
        output_weight(chunk),
        labels,
        token_loss,
        grad_scale=grad_scale,
        **linear_options(objective, chunk),
    )
    assert entropy is not None
    return loss, log_probs, entropy, metric_sums


def _figures(sums: Report, inputs: Sequence[StepInput]) -> BatchFigures:
    batch = {name.removeprefix(_BATCH): sums.pop(name) for name in list(sums) if name.startswith(_BATCH)}
    lengths = inputs[0].micro_batch.response_lengths.double()
    sample_nll = sums.pop(_SAMPLE_NLL).cpu() / lengths.clamp(min=1)
    scalars = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    num_tokens, gap_tokens, gap = (scalars.pop(name) for name in ("num_tokens", "gap_tokens", "log_prob_gap_mean"))
    metrics = {name: value / max(num_tokens, 1.0) for name, value in scalars.items()}
    if gap_tokens:
        metrics["log_prob_gap_mean"] = gap / gap_tokens
    return BatchFigures(metrics, int(num_tokens), batch or None, sample_nll)
