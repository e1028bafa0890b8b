"""Train a tiny model on fixed groups, one job after the other; started by torchrun, one process a rank.

A job is FAMILY+LAYOUT and what is different in it, e.g. "qwen2+tp2sp+fused": "+fused" runs with --fused-linear-loss,
"+sft" with that loss, "+not-token-local" as if the loss needed the whole batch, "+resumed" saves after the first step
and goes on with what another model and optimizer load; the name of a mutation breaks one thing. For each: loss and
every gradient of the first step (under Hugging Face names, whole), then the losses of two more steps. The optimizer,
DDP, schedules, packing and weight loading are those of a real run. Results go to OUT/JOB.pt; test_equivalence.py
compares them.

    torchrun --nproc-per-node 4 equivalence_worker.py --models DIR --out DIR --jobs qwen2+one qwen2+tp2pp2+fused
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import torch
import torch.distributed as dist
from ragged_batch import ragged_groups
from worlds import run_in_worlds

from gft_megatron.training import cpu

cpu.install()

from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region as upstream_gather

from gft_megatron.config import ModelConfig, OptimizerSettings, ParallelConfig
from gft_megatron.convert.families.tables import KEPT_IN_FLOAT32
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.losses import LOSSES
from gft_megatron.ops.linear import _spread as upstream_spread
from gft_megatron.training import model as models
from gft_megatron.training import step as steps
from gft_megatron.training.checkpoint import load_checkpoint, save_checkpoint
from gft_megatron.training.fused_linear import return_hidden_states
from gft_megatron.training.micro_batches import pack_for_this_replica
from gft_megatron.training.optimizer import build_optimizer, build_scheduler
from gft_megatron.training.parallel import lay_out, seed_ranks
from gft_megatron.training.weights import export_hf_tensors, load_weights

LAYOUTS = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2overlap": {"pipeline_model_parallel_size": 2, "overlap_grad_reduce": True},
    "pp2vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "dp2": {},
    "dp2distopt": {"use_distributed_optimizer": True},
    "dp2overlap": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "cp2": {"context_parallel_size": 2},
    "tp2pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tp2pp2sp": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    "ep2": {"expert_model_parallel_size": 2},
    "ep2distopt": {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
    "ep2overlap": {
        "expert_model_parallel_size": 2,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "ep2cp2": {"expert_model_parallel_size": 2, "context_parallel_size": 2},
    "ep2pp2": {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "ep2tp2sp": {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "etp2tp2sp": {"expert_tensor_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tp2cp2": {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
}


HYPER = {"gft": {"tau": 0.05}, "sft": {}}


def num_ranks(layout: str) -> int:
    parallel = ParallelConfig(**LAYOUTS[layout])
    model_ranks = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    expert_ranks = parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    return 1 if layout == "one" else max(2, model_ranks, expert_ranks)


def run_job(job: str, root: Path, out: Path) -> dict:
    family, layout, *options = job.split("+")
    assert set(options) <= {"fused", "sft", "not-token-local", "resumed", *MUTATIONS}, job
    is_broken = not MUTATIONS.keys().isdisjoint(options)
    with contextlib.ExitStack() as patches:
        for option in options:
            if option in MUTATIONS:
                patches.enter_context(MUTATIONS[option]())
        if "not-token-local" in options:  # the path of the losses that need the whole batch
            patches.enter_context(patch.object(steps, "is_token_local", lambda loss: False))
        try:
            return train(
                LAYOUTS[layout],
                HfFolder(root / family),
                loss="sft" if "sft" in options else "gft",
                fused="fused" in options,
                checkpoints=out / f"{job}-checkpoints" if "resumed" in options else None,
            )
        except FloatingPointError as error:
            if not is_broken:
                raise
            return {"error": str(error)}
        finally:
            parallel_state.destroy_model_parallel()


def build(parallel: ParallelConfig, folder: HfFolder, settings: OptimizerSettings, *, fused: bool) -> tuple:
    """Wrapped chunks with the folder's weights, optimizer, schedule."""
    model_config = ModelConfig(hf_checkpoint=str(folder.path), make_vocab_size_divisible_by=1)
    config = models.transformer_config(folder.shape, model_config, parallel, {})
    vocab_size = models.padded_vocab_size(folder.shape, model_config, parallel)
    device = torch.device("cpu")
    chunks = models.build_chunks(folder.shape, config, vocab_size=vocab_size, max_sequence_length=64, device=device)
    if fused:
        return_hidden_states(chunks, config, {})
    load_weights(chunks, folder, padded_vocab_size=vocab_size)
    wrapped = models.wrap_in_ddp(chunks, config, parallel, {})
    optimizer = build_optimizer(wrapped, settings, parallel, bf16=False, overrides={})
    return wrapped, optimizer, build_scheduler(optimizer, settings)


def train(layout: dict, folder: HfFolder, *, loss: str, fused: bool, checkpoints: Path | None) -> dict:
    parallel = ParallelConfig(**layout)
    lay_out(parallel)
    seed_ranks(1)
    settings = OptimizerSettings(train_iters=10, lr=1e-3, max_tokens_per_gpu=160)
    wrapped, optimizer, scheduler = build(parallel, folder, settings, fused=fused)
    objective = steps.Objective(
        loss=LOSSES[loss], hyper=HYPER[loss], vocab_size=folder.shape.vocab_size, fused_linear_loss=fused
    )
    inputs = list(map(steps.StepInput, pack_for_this_replica(ragged_groups(), parallel, max_tokens=160)))

    figures = steps.forward_backward(wrapped, optimizer, inputs, objective)
    result = {"metrics": figures.metrics, "num_tokens": figures.num_tokens}
    result["gradients"] = whole_gradients(wrapped, folder)
    optimizer.step()
    scheduler.step(increment=1)
    if checkpoints is not None:
        saved = save_checkpoint(checkpoints, 1, wrapped, optimizer, scheduler, {}, keep_last=1)
        wrapped, optimizer, scheduler = build(parallel, folder, settings, fused=fused)
        state, _ = load_checkpoint(saved, wrapped, optimizer)
        scheduler.load_state_dict(state["scheduler"])
    result["later"] = [
        steps.train_step(wrapped, optimizer, scheduler, inputs, objective).figures.metrics for _ in range(2)
    ]
    result["weights"] = {name: tensor.clone() for name, tensor in export_hf_tensors(wrapped, folder.shape)}
    dist.barrier()
    return result


def whole_gradients(wrapped: list, folder: HfFolder) -> dict[str, torch.Tensor]:
    """Put the gradients where the weights are, and gather them as weights are gathered."""
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    of_experts = parallel_state.get_expert_data_parallel_group()
    weights = []
    for chunk in wrapped:
        if chunk.ddp_config.use_distributed_optimizer:
            # Each rank has reduced its own slice of each bucket.
            for buffers, group in ((chunk.buffers, replicas), (chunk.expert_parallel_buffers, of_experts)):
                for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                    mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
        for parameter in chunk.parameters():
            weights.append((parameter, parameter.data.clone()))
            parameter.data.copy_(parameter.main_grad)
    gradients = {
        name: tensor.clone()
        for name, tensor in export_hf_tensors(wrapped, folder.shape)
        if not name.endswith(KEPT_IN_FLOAT32)  # biases of experts, which are not trained
    }
    for parameter, weight in weights:
        parameter.data.copy_(weight)
    for chunk in wrapped:
        for bucket_group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            # No run exports before the optimizer's step: the weights gathered above are not those of the next pass.
            bucket_group.param_gather_dispatched = False
    return gradients


def no_all_gather():
    from gft_megatron.ops import log_probs

    return patch.object(log_probs, "_gather", lambda stats, tp_group: stats[None])


def per_micro_batch():
    def mean_of_micro_batch(per_token_loss, mask):
        count = mask.sum()
        return per_token_loss.sum() / count.clamp(min=1), (count > 0).int()

    return patch.object(steps, "token_sum", mean_of_micro_batch)


def no_gradient_sum():
    """Each context-parallel rank keeps the gradient of its own queries for all keys instead of the sum."""
    from gft_megatron.training import spec

    return patch.object(
        spec,
        "gather_from_sequence_parallel_region",
        lambda x, group: upstream_gather(x, tensor_parallel_output_grad=False, group=group),
    )


def no_hidden_sum():
    linear = importlib.import_module("gft_megatron.ops.linear_loss")
    return patch.object(
        linear, "start_hidden_reduction", lambda grad, tokens, shard: lambda: upstream_spread(grad, tokens)
    )


MUTATIONS = {
    "no-all-gather": no_all_gather,
    "per-micro-batch": per_micro_batch,
    "no-gradient-sum": no_gradient_sum,
    "no-hidden-sum": no_hidden_sum,
}
"""Break one thing that the test is there to protect, and mend it."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", nargs="+", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    init_num_microbatches_calculator(int(os.environ["RANK"]), None, 1, 1, 1)

    def run(job: str) -> None:
        result = run_job(job, arguments.models, arguments.out)
        if dist.get_rank() == 0:
            torch.save(result, arguments.out / f"{job}.pt")

    run_in_worlds(by_num_ranks(arguments.jobs, lambda job: job.split("+")[1]), run, arguments.out)
    assert "torch._inductor.compile_fx" not in sys.modules, "a second of every start (training/cpu.py)"


def by_num_ranks(jobs: list[str], layout_of: Callable[[str], str]) -> dict[int, list[str]]:
    sizes = sorted({num_ranks(layout_of(job)) for job in jobs})
    return {size: [job for job in jobs if num_ranks(layout_of(job)) == size] for size in sizes}


if __name__ == "__main__":
    main()
