"""Loss and gradient of every loss on one ragged batch, under one parallel layout after another; one process a rank.

Started by torchrun. The reference is a second model, whose log-probs also stand for the old policy's, so that no ratio
is 1. Results go to OUT/<layout>.pt; test_losses_on_ranks.py compares them.

    torchrun --nproc-per-node 2 losses_worker.py --model DIR --reference DIR --out DIR --layouts tp2 pp2
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

# Sets up the environment and the stand-ins for CUDA before Megatron is imported.
from equivalence_worker import LAYOUTS, whole_gradients  # isort: skip

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from ragged_batch import ragged_groups

from gft_megatron.config import ModelConfig, OptimizerSettings, ParallelConfig
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.groups import Batch, Source
from gft_megatron.losses import LOSSES, LossFn, required_inputs
from gft_megatron.losses.reduce import response_weights
from gft_megatron.losses.terms import with_terms
from gft_megatron.training import model as models
from gft_megatron.training import step
from gft_megatron.training.micro_batches import pack_for_this_replica
from gft_megatron.training.optimizer import build_optimizer
from gft_megatron.training.parallel import lay_out, seed_ranks
from gft_megatron.training.reference import Reference
from gft_megatron.training.weights import load_hf_weights

# Hyper-parameters that put tokens on both sides of every branch; the defaults do for the rest.
CASES: dict[str, tuple[LossFn, dict, str]] = {
    **{name: (loss, {}, "token-mean") for name, loss in LOSSES.items()},
    "gft": (LOSSES["gft"], {"tau": 0.05}, "token-mean"),
    "sft_go each sample": (LOSSES["sft_go"], {"per_sample": True}, "token-mean"),
    "grpo, mean of responses": (LOSSES["grpo"], {}, "seq-mean"),
    "chord_mu, separate means": (LOSSES["chord_mu"], {"separate_means": True}, "token-mean"),
    "gspo with everything": (
        with_terms(LOSSES["gspo"], terms=("kl_coef", "entropy_coef", "mix_coef"), mix=LOSSES["cadft"]),
        {"kl_coef": 0.3, "entropy_coef": 0.2, "mix_coef": 0.5},
        "constant",
    ),
}
MAX_TOKENS = {"": 120, "+long": 240}
"""Tokens of a micro-batch: 4 and 2 of them on one rank."""


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


def run_layout(name: str, folder: HfFolder, reference_folder: HfFolder, cases: list[str]) -> dict[str, dict]:
    layout, _, suffix = name.partition("+")
    parallel = ParallelConfig(**LAYOUTS[layout])
    lay_out(parallel)
    seed_ranks(1)
    model_config = ModelConfig(hf_checkpoint=str(folder.path), make_vocab_size_divisible_by=1)
    config = models.transformer_config(folder.shape, model_config, parallel, {})
    vocab_size = models.padded_vocab_size(folder.shape, model_config, parallel)
    device = torch.device("cpu")
    chunks = models.build_chunks(folder.shape, config, vocab_size=vocab_size, max_sequence_length=64, device=device)
    load_hf_weights(chunks, folder, padded_vocab_size=vocab_size)
    reference = Reference(chunks, reference_folder, padded_vocab_size=vocab_size)
    wrapped = models.wrap_in_ddp(chunks, config, parallel, {})
    optimizer = build_optimizer(wrapped, OptimizerSettings(train_iters=1), parallel, bf16=False, overrides={})
    batch = sampled_groups()

    results = {}
    for case in cases:
        loss, hyper, reduction = CASES[case]
        objective = step.Objective(loss=loss, hyper=hyper, vocab_size=folder.shape.vocab_size)
        weights = response_weights(batch.lengths - batch.prompt_lengths, reduction, longest=30)
        packed = pack_for_this_replica(
            batch, parallel, max_tokens=MAX_TOKENS["+" + suffix if suffix else ""], weights=weights
        )
        inputs = reference.forward(
            wrapped, list(map(step.StepInput, packed)), objective, with_logits="ref_kl" in required_inputs(loss)
        )
        inputs = [dataclasses.replace(item, old_log_probs=item.ref_log_probs) for item in inputs]
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


def mutate(what: str) -> None:
    """Break one thing that the test is there to protect."""
    if what == "batch of this rank":
        upstream = step.forward_batch_sums
        all_reduce = dist.all_reduce

        def of_this_rank(*arguments):
            dist.all_reduce = lambda *_, **__: None
            try:
                return upstream(*arguments)
            finally:
                dist.all_reduce = all_reduce

        step.forward_batch_sums = of_this_rank
    elif what == "sequences in parts":
        step._context_sum = lambda values: values
    elif what == "batch of this micro-batch":
        step.forward_batch_sums = lambda *_: None
    else:
        assert what == "nothing", what


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layouts", nargs="+", required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--mutate", default="nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    init_num_microbatches_calculator(dist.get_rank(), None, 1, 1, 1)
    mutate(arguments.mutate)
    for name in arguments.layouts:
        results = run_layout(name, HfFolder(arguments.model), HfFolder(arguments.reference), arguments.cases)
        if dist.get_rank() == 0:
            torch.save(results, arguments.out / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
