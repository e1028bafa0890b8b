"""From the samples of a rollout to the packed micro-batches of one rank: which step, which replica, which part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from torch import Tensor

from gft_megatron.config import OptimizerSettings, ParallelConfig
from gft_megatron.data.packing import PackedMicroBatch, pack_micro_batch, packed_length, plan_micro_batches
from gft_megatron.groups import Batch


def split_over_steps(batch: Batch, settings: OptimizerSettings) -> Iterator[Batch]:
    """The groups of a rollout, divided over its optimizer steps, as often as there are epochs. Groups stay whole."""
    groups = batch.group_ids.unique()
    num_steps = min(settings.num_steps_per_rollout, len(groups))
    for _ in range(settings.num_epochs_per_rollout):
        for part in groups.tensor_split(num_steps):
            yield batch.select(torch.isin(batch.group_ids, part).nonzero()[:, 0].tolist())


def pack_for_this_replica(
    batch: Batch,
    parallel: ParallelConfig,
    *,
    max_tokens: int,
    max_sequences: int | None = None,
    weights: Tensor | None = None,
) -> list[PackedMicroBatch]:
    """This rank's part of the micro-batches: as many on each replica, all of one length.

    Args:
        weights: [samples of the batch], see `losses.reduce.response_weights`; None: 1.
    """
    context = parallel.context_parallel_size
    sequence_multiple = 2 * context if context > 1 else 1
    plan = plan_micro_batches(
        batch.lengths.tolist(),
        num_replicas=parallel_state.get_data_parallel_world_size(),
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        # The interleaved schedule works through micro-batches in groups of one for each stage.
        multiple_of=parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size else 1,
    )
    mine = plan[parallel_state.get_data_parallel_rank()]
    length = max(
        packed_length(
            batch.lengths[indices].tolist(),
            sequence_multiple=sequence_multiple,
            length_multiple=sequence_multiple * parallel.tensor_model_parallel_size,
        )
        for indices in mine
    )
    return [
        pack_micro_batch(
            batch,
            indices,
            length=length,
            weights=weights,
            sequence_multiple=sequence_multiple,
            cp_size=context,
            cp_rank=parallel_state.get_context_parallel_rank(),
        )
        for indices in mine
    ]
