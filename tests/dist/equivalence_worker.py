"""Train a tiny model on fixed groups under one parallel layout after another; started by torchrun, one process a rank.

For each layout: loss and every gradient of the first step (under Hugging Face names, whole), then the losses of three
more steps. The optimizer, DDP, schedules, packing and weight loading are those of a real run. Results go to
OUT/<layout>.pt; test_equivalence.py compares them. A layout with "+fused" behind its name runs with --fused-linear-loss.

    torchrun --nproc-per-node 2 equivalence_worker.py --model DIR --out DIR --layouts tp2 pp2 [--mutate per-micro-batch]
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import torch
import torch.distributed as dist
from ragged_batch import ragged_groups

from gft_megatron.training import cpu

cpu.install()

from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region as upstream_gather

from gft_megatron.config import ModelConfig, OptimizerSettings, ParallelConfig
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.losses import LOSSES
from gft_megatron.ops.linear import _spread as upstream_spread
from gft_megatron.training import model as models
from gft_megatron.training import step as steps
from gft_megatron.training.fused_linear import return_hidden_states
from gft_megatron.training.micro_batches import pack_for_this_replica
from gft_megatron.training.optimizer import build_optimizer, build_scheduler
from gft_megatron.training.parallel import lay_out, seed_ranks
from gft_megatron.training.weights import export_hf_tensors, load_hf_weights

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
    "tp2cp2": {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
}


FUSED = "+fused"
HYPER = {"gft": {"tau": 0.05}, "sft": {}}


def run_layout(name: str, folder: HfFolder, *, loss: str) -> dict:
    layout, fused = name.removesuffix(FUSED), name.endswith(FUSED)
    parallel = ParallelConfig(**LAYOUTS[layout])
    lay_out(parallel)
    seed_ranks(1)
    model_config = ModelConfig(hf_checkpoint=str(folder.path), make_vocab_size_divisible_by=1)
    settings = OptimizerSettings(train_iters=10, lr=1e-3, max_tokens_per_gpu=160)
    config = models.transformer_config(folder.shape, model_config, parallel, {})
    vocab_size = models.padded_vocab_size(folder.shape, model_config, parallel)
    device = torch.device("cpu")
    chunks = models.build_chunks(folder.shape, config, vocab_size=vocab_size, max_sequence_length=64, device=device)
    if fused:
        return_hidden_states(chunks, config, {})
    load_hf_weights(chunks, folder, padded_vocab_size=vocab_size)
    wrapped = models.wrap_in_ddp(chunks, config, parallel, {})
    optimizer = build_optimizer(wrapped, settings, parallel, bf16=False, overrides={})
    scheduler = build_scheduler(optimizer, settings)
    objective = steps.Objective(
        loss=LOSSES[loss], hyper=HYPER[loss], vocab_size=folder.shape.vocab_size, fused_linear_loss=fused
    )
    inputs = list(map(steps.StepInput, pack_for_this_replica(ragged_groups(), parallel, max_tokens=160)))

    figures = steps.forward_backward(wrapped, optimizer, inputs, objective)
    result = {"metrics": figures.metrics, "num_tokens": figures.num_tokens}
    result["gradients"] = whole_gradients(wrapped, folder)
    optimizer.step()
    scheduler.step(increment=1)
    result["later"] = [
        steps.train_step(wrapped, optimizer, scheduler, inputs, objective).figures.metrics for _ in range(3)
    ]
    result["weights"] = {name: tensor.clone() for name, tensor in export_hf_tensors(wrapped, folder.shape)}
    dist.barrier()
    parallel_state.destroy_model_parallel()
    return result


def whole_gradients(wrapped: list, folder: HfFolder) -> dict[str, torch.Tensor]:
    """Put the gradients where the weights are, and gather them as weights are gathered."""
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    weights = []
    for chunk in wrapped:
        if chunk.ddp_config.use_distributed_optimizer:
            for buffer in chunk.buffers:  # each rank has reduced its own slice of each bucket
                for bucket in buffer.buckets:
                    mine = bucket.grad_data.chunk(replicas.size())[replicas.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, mine, group=replicas)
        for parameter in chunk.parameters():
            weights.append((parameter, parameter.data.clone()))
            parameter.data.copy_(parameter.main_grad)
    gradients = {name: tensor.clone() for name, tensor in export_hf_tensors(wrapped, folder.shape)}
    for parameter, weight in weights:
        parameter.data.copy_(weight)
    for chunk in wrapped:
        for bucket_group in chunk.bucket_groups:
            # No run exports before the optimizer's step: the weights gathered above are not those of the next pass.
            bucket_group.param_gather_dispatched = False
    return gradients


def mutate(what: str) -> None:
    """Break one thing that the test is there to protect."""
    if what == "no-all-gather":
        from gft_megatron.ops import log_probs

        log_probs._gather = lambda stats, tp_group: stats[None]
    elif what == "per-micro-batch":

        def mean_of_micro_batch(per_token_loss, mask):
            count = mask.sum()
            return per_token_loss.sum() / count.clamp(min=1), (count > 0).int()

        steps.token_sum = mean_of_micro_batch
    elif what == "no-gradient-sum":
        from gft_megatron.training import spec

        # Each context-parallel rank keeps the gradient of its own queries for all keys instead of the sum.
        spec.gather_from_sequence_parallel_region = lambda x, group: upstream_gather(
            x, tensor_parallel_output_grad=False, group=group
        )
    elif what == "no-hidden-sum":
        linear = importlib.import_module("gft_megatron.ops.linear_loss")
        linear.start_hidden_reduction = lambda grad, tokens, shard: lambda: upstream_spread(grad, tokens)
    elif what == "not-token-local":
        # Nothing is broken: no loss of today needs the whole batch, and one that does takes this path.
        steps.is_token_local = lambda loss: False
    else:
        assert what == "nothing", what


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS, *(name + FUSED for name in LAYOUTS)], required=True)
    parser.add_argument("--loss", default="gft")
    parser.add_argument("--mutate", default="nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    init_num_microbatches_calculator(dist.get_rank(), None, 1, 1, 1)
    mutate(arguments.mutate)
    for name in arguments.layouts:
        result = run_layout(name, HfFolder(arguments.model), loss=arguments.loss)
        if dist.get_rank() == 0:
            torch.save(result, arguments.out / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
