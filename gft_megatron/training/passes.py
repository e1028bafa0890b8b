"""One pass of Megatron's pipeline schedule over the micro-batches of this replica, and the sum of what came of it.

Only the last pipeline stage sees logits, or the hidden states that they are made of (--fused-linear-loss).

Legend: t tokens of a micro-batch on this context-parallel rank, v/p vocabulary shard of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from gft_megatron.data.packing import PackedMicroBatch
from gft_megatron.training.parallel import is_last_stage

Chunks = list[DistributedDataParallel]
Report = dict[str, Tensor]


class _HasMicroBatch(Protocol):
    @property
    def micro_batch(self) -> PackedMicroBatch: ...


Item = TypeVar("Item", bound=_HasMicroBatch)
# (output of the last stage, item, its chunk) -> (loss, number of tokens, report)
LossFunc = Callable[[Tensor, Item, DistributedDataParallel], tuple[Tensor, Tensor, Report]]


def run_schedule(
    chunks: Chunks, items: Sequence[Item], loss_func: LossFunc[Item], *, forward_only: bool
) -> list[Report]:
    """What `loss_func` reported for each micro-batch, in order; empty but on the last stage."""

    def forward_step(iterator: Iterator[Item], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        item = next(iterator)
        return _forward(chunk, item.micro_batch), lambda output: loss_func(output, item, chunk)

    iterators = [iter(items) for _ in chunks]
    with torch.set_grad_enabled(not forward_only):  # forward_only alone still records the graph
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(items),
            seq_length=items[0].micro_batch.length,
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


def sum_over_replicas(reports: list[Report]) -> Report:
    """Add up the reports of all micro-batches on the last stages and tell every rank. fp64, scalars and vectors."""
    shapes = [{name: tuple(value.shape) for name, value in sorted(reports[0].items())}] if is_last_stage() else [None]
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    if pipeline.size() > 1:
        dist.broadcast_object_list(shapes, src=last, group=pipeline)
    assert shapes[0] is not None
    sizes = [torch.Size(shape).numel() for shape in shapes[0].values()]
    sums = torch.zeros(sum(sizes), dtype=torch.float64, device=torch.cuda.current_device())
    if is_last_stage():
        for report in reports:
            sums += torch.cat([report[name].double().reshape(-1) for name in shapes[0]])
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if pipeline.size() > 1:
        dist.broadcast(sums, src=last, group=pipeline)
    parts = sums.split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes[0].items(), parts, strict=True)}
