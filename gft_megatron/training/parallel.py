"""Process groups: torch.distributed, Megatron's parallel state, and the few facts that the loop asks of them."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from gft_megatron.config import ParallelConfig


def initialize(parallel: ParallelConfig, seed: int) -> torch.device:
    """Join the ranks that torchrun started, lay them out, seed them; return this rank's device.

    Raises:
        ValueError: the layout does not fit the number of ranks.
    """
    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        # gloo beside NCCL: token arrays and counters are exchanged from host memory.
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=timeout)
    lay_out(parallel, timeout=timeout)
    seed_ranks(seed)
    return device


def lay_out(parallel: ParallelConfig, *, timeout: datetime.timedelta | None = None) -> None:
    """Create Megatron's process groups for this layout."""
    model_ranks = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    if dist.get_world_size() % model_ranks:
        raise ValueError(
            f"{dist.get_world_size()} ranks cannot be divided into replicas of {model_ranks}: "
            f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} x "
            f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size} x "
            f"--context-parallel-size {parallel.context_parallel_size}"
        )
    expert_ranks = (
        parallel.expert_tensor_parallel_size
        * parallel.expert_model_parallel_size
        * parallel.pipeline_model_parallel_size
    )
    if dist.get_world_size() % expert_ranks:
        raise ValueError(
            f"the experts cannot be divided over {dist.get_world_size()} ranks: it has to be a multiple of "
            f"--expert-tensor-parallel-size {parallel.expert_tensor_parallel_size} x "
            f"--expert-model-parallel-size {parallel.expert_model_parallel_size} x "
            f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}"
        )
    both_divided = min(parallel.expert_tensor_parallel_size, parallel.expert_model_parallel_size) > 1
    if both_divided and not torch.cuda.is_available():
        raise ValueError(
            f"--expert-tensor-parallel-size {parallel.expert_tensor_parallel_size} beside "
            f"--expert-model-parallel-size {parallel.expert_model_parallel_size} gathers unequal shares, which gloo "
            f"cannot: without a GPU one of them has to be 1"
        )
    timeouts = {} if timeout is None else {"distributed_timeout_minutes": max(1, int(timeout.total_seconds() // 60))}
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        **timeouts,
    )


def seed_ranks(seed: int) -> None:
    """One seed for each pipeline stage; Megatron's tracker gives its tensor-parallel ranks their own where need be.

    Stages differ as in megatron/training/initialize.py: with one seed for all, their first layers would be equal.
    """
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def is_replica_leader() -> bool:
    """True on the first rank of each data-parallel replica: first stage, first tensor- and context-parallel rank."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_pipeline_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def is_last_stage() -> bool:
    """True on the pipeline stage that holds the output layer."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)
