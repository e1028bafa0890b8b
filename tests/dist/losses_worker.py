"""Loss and gradient of every loss on one ragged batch, under one parallel layout after another; one process a rank.

Started by torchrun. A job is a layout, "+long" behind it for longer micro-batches, or a layout and a mutation. The
reference is a second model, whose log-probs also stand for the old policy's, so that no ratio is 1. Results go to
OUT/JOB.pt; test_losses_on_ranks.py compares them.

    torchrun --nproc-per-node 2 losses_worker.py --model DIR --reference DIR --out DIR --jobs one tp2sp
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from pathlib import Path
from unittest.mock import patch

# Sets up the environment and the stand-ins for CUDA before Megatron is imported.
from equivalence_worker import LAYOUTS, by_num_ranks, whole_gradients  # isort: skip

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from ragged_batch import ragged_groups
from worlds import run_in_worlds

from gft_megatron.config import ModelConfig, OptimizerSettings, ParallelConfig
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.groups import Batch, Source
from gft_megatron.losses import LOSSES, LossFn, required_inputs
from gft_megatron.losses.reduce import response_weights
from gft_megatron.losses.terms import with_terms
from gft_megatron.training import model as models
from gft_megatron.training import step
from gft_megatron.training.excess import with_excess_groups
from gft_megatron.training.micro_batches import pack_for_this_replica
from gft_megatron.training.optimizer import build_optimizer
from gft_megatron.training.parallel import lay_out, seed_ranks
from gft_megatron.training.reference import Reference
from gft_megatron.training.weights import load_weights

BY_EXCESS = "sft_go, groups by excess loss"
ETA = 0.3
# Hyper-parameters that put tokens on both sides of every branch; the defaults do for the rest.
CASES: dict[str, tuple[LossFn, dict, str]] = {
    **{name: (loss, {}, "token-mean") for name, loss in LOSSES.items()},
    "gft": (LOSSES["gft"], {"tau": 0.05}, "token-mean"),
    "sft_go each sample": (LOSSES["sft_go"], {"per_sample": True}, "token-mean"),
    BY_EXCESS: (LOSSES["sft_go"], {}, "token-mean"),
    "grpo, mean of responses": (LOSSES["grpo"], {}, "seq-mean"),
    "chord_mu, separate means": (LOSSES["chord_mu"], {"separate_means": True}, "token-mean"),
    "gspo with everything": (
        with_terms(LOSSES["gspo"], terms=("kl_coef", "entropy_coef", "mix_coef"), mix=LOSSES["cadft"]),
        {"kl_coef": 0.3, "entropy_coef": 0.2, "mix_coef": 0.5},
        "constant",
    ),
}


def sampled_groups() -> Batch:
    """With the sampler's log-probs of own samples, the first two tokens of each a hint, and groups for all tokens."""
    batch = ragged_groups()
    generator = torch.Generator().manual_seed(12)
    own = (batch.sources == int(Source.SELF)).repeat_interleave(batch.lengths)
    place = torch.cat([torch.arange(n) - p for n, p in zip(batch.lengths, batch.prompt_lengths, strict=True)])
    drawn = -3.0 * torch.rand(len(own), generator=generator)
    return dataclasses.replace(
        batch,
        rollout_log_probs=drawn.where(own & (place >= 2), torch.nan),
        token_groups=torch.randint(0, 3, (len(own),), generator=generator),
    )


def run_job(job: str, folder: HfFolder, reference_folder: HfFolder) -> dict[str, dict]:
    layout, _, option = job.partition("+")
    assert option in ("", "long", *MUTATIONS), job
    mutation, cases = MUTATIONS.get(option, (contextlib.nullcontext, list(CASES)))
    max_tokens = 240 if option == "long" else 120  # 4 micro-batches of them on one rank, or 2
    with mutation():
        return run_layout(layout, folder, reference_folder, cases, max_tokens)


def run_layout(
    layout: str, folder: HfFolder, reference_folder: HfFolder, cases: list[str], max_tokens: int
) -> dict[str, dict]:
    parallel = ParallelConfig(**LAYOUTS[layout])
    lay_out(parallel)
    seed_ranks(1)
    model_config = ModelConfig(hf_checkpoint=str(folder.path), make_vocab_size_divisible_by=1)
    config = models.transformer_config(folder.shape, model_config, parallel, {})
    vocab_size = models.padded_vocab_size(folder.shape, model_config, parallel)
    device = torch.device("cpu")
    chunks = models.build_chunks(folder.shape, config, vocab_size=vocab_size, max_sequence_length=64, device=device)
    load_weights(chunks, folder, padded_vocab_size=vocab_size)
    reference = Reference(chunks, lambda: load_weights(chunks, reference_folder, padded_vocab_size=vocab_size))
    wrapped = models.wrap_in_ddp(chunks, config, parallel, {})
    optimizer = build_optimizer(wrapped, OptimizerSettings(train_iters=1), parallel, bf16=False, overrides={})
    batch = sampled_groups()

    results = {}
    for case in cases:
        loss, hyper, reduction = CASES[case]
        objective = step.Objective(loss=loss, hyper=hyper, vocab_size=folder.shape.vocab_size)
        weights = response_weights(batch.lengths - batch.prompt_lengths, reduction, longest=30)
        packed = pack_for_this_replica(batch, parallel, max_tokens=max_tokens, weights=weights)
        inputs = reference.forward(
            wrapped, list(map(step.StepInput, packed)), objective, with_logits="ref_kl" in required_inputs(loss)
        )
        inputs = [dataclasses.replace(item, old_log_probs=item.ref_log_probs) for item in inputs]
        if case == BY_EXCESS:
            inputs = with_excess_groups(batch, inputs, wrapped, objective, ETA)
        figures = step.forward_backward(wrapped, optimizer, inputs, objective)
        results[case] = {
            "metrics": figures.metrics,
            "sample_nll": figures.sample_nll,
            "gradients": whole_gradients(wrapped, folder),
            "num_micro_batches": len(packed),
        }
    dist.barrier()
    parallel_state.destroy_model_parallel()
    return results


def batch_of_this_rank():
    upstream = step.forward_batch_sums

    def of_this_rank(*arguments):
        with patch.object(dist, "all_reduce", lambda *_, **__: None):
            return upstream(*arguments)

    return patch.object(step, "forward_batch_sums", of_this_rank)


def batch_of_this_micro_batch():
    return patch.object(step, "forward_batch_sums", lambda *_: None)


def sequences_in_parts():
    return patch.object(step, "_context_sum", lambda values: values)


MUTATIONS = {
    "batch of this rank": (batch_of_this_rank, ["cadft", "sft_go", "uft", "chord_mu, separate means"]),
    "batch of this micro-batch": (batch_of_this_micro_batch, ["cadft", "sft_go"]),
    "sequences in parts": (sequences_in_parts, ["cadft", "gspo", "iw_sft", "poft", "sft_go each sample"]),
}
"""What breaks one thing that the test is there to protect, and the cases that have to show it."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", nargs="+", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    init_num_microbatches_calculator(int(os.environ["RANK"]), None, 1, 1, 1)

    def run(job: str) -> None:
        result = run_job(job, HfFolder(arguments.model), HfFolder(arguments.reference))
        if dist.get_rank() == 0:
            torch.save(result, arguments.out / f"{job}.pt")

    run_in_worlds(by_num_ranks(arguments.jobs, lambda job: job.split("+")[0]), run, arguments.out)


if __name__ == "__main__":
    main()
