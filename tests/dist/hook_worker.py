"""A foreign training script with a loss put on its model by hook_loss; started by torchrun, one process a rank.

For each layout: loss and every gradient of one batch of padded rows [b, s], by Megatron's own schedule and a loss_func
that masks and sums. Before that, on 1 rank ("one"), the same responses packed through this project's own loop. Results
go to OUT/<layout>.pt; test_hook.py compares them.

    torchrun --nproc-per-node 2 hook_worker.py --model DIR --out DIR --layouts tp2 pp2
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import torch
import torch.distributed as dist
from equivalence_worker import LAYOUTS, by_num_ranks, whole_gradients  # installs the CPU stand-ins for CUDA
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.pipeline_parallel import get_forward_backward_func
from ragged_batch import ragged_groups
from worlds import run_in_worlds

from gft_megatron import LOSSES, hook_loss
from gft_megatron.config import ModelConfig, OptimizerSettings, ParallelConfig
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.training import hook as hooks
from gft_megatron.training import model as models
from gft_megatron.training import step as steps
from gft_megatron.training.micro_batches import pack_for_this_replica
from gft_megatron.training.optimizer import build_optimizer
from gft_megatron.training.parallel import is_last_stage, lay_out, seed_ranks
from gft_megatron.training.weights import load_weights

ROWS = 6  # sequences of a micro-batch
LENGTH = 40
VOCAB = 131


def run_layout(name: str, folder: HfFolder) -> dict[str, Any]:
    parallel = ParallelConfig(**LAYOUTS[name])
    lay_out(parallel)
    seed_ranks(1)
    chunks, wrapped = build(folder, parallel)
    result = {"own": own_loop(wrapped, folder, parallel)} if name == "one" else {}

    hook = hook_loss(wrapped if len(wrapped) > 1 else wrapped[0], "dft", vocab_size=VOCAB)
    result["hooked"] = foreign_loop(wrapped, folder)
    result["hooked"]["metrics"] = {key: (value.item(), value.requires_grad) for key, value in hook.metrics.items()}
    if name == "tp2":
        with without_the_process_group():
            result["broken"] = foreign_loop(wrapped, folder)
    hook.remove()
    result["removed"] = all("compute_language_model_loss" not in vars(models.unwrapped(chunk)) for chunk in chunks)
    if len(chunks) == 1:
        result["losses"] = compare_losses(wrapped[0])
    if name == "one":
        result["bf16"] = compare_losses(build(folder, parallel, bf16=True)[0][0])
        result["refused"] = refused(chunks[0], folder, parallel)
    if name == "tp2":
        result["gathered"] = gathered(wrapped[0])
    dist.barrier()
    parallel_state.destroy_model_parallel()
    return result


def build(folder: HfFolder, parallel: ParallelConfig, *, bf16: bool = False, **overrides: Any) -> tuple[list, list]:
    model_config = ModelConfig(hf_checkpoint=str(folder.path), make_vocab_size_divisible_by=1, bf16=bf16)
    config = models.transformer_config(folder.shape, model_config, parallel, overrides)
    vocab_size = models.padded_vocab_size(folder.shape, model_config, parallel)
    chunks = models.build_chunks(
        folder.shape, config, vocab_size=vocab_size, max_sequence_length=64, device=torch.device("cpu")
    )
    load_weights(chunks, folder, padded_vocab_size=vocab_size)
    return chunks, models.wrap_in_ddp(chunks, config, parallel, {})


def own_loop(wrapped: list, folder: HfFolder, parallel: ParallelConfig) -> dict[str, Any]:
    settings = OptimizerSettings(train_iters=10, lr=1e-3, max_tokens_per_gpu=160)
    optimizer = build_optimizer(wrapped, settings, parallel, bf16=False, overrides={})
    objective = steps.Objective(loss=LOSSES["dft"], vocab_size=VOCAB)
    inputs = list(map(steps.StepInput, pack_for_this_replica(ragged_groups(), parallel, max_tokens=160)))
    figures = steps.forward_backward(wrapped, optimizer, inputs, objective)
    gradients = whole_gradients(wrapped, folder)
    return {"loss": figures.metrics["loss"], "num_tokens": figures.num_tokens, "gradients": gradients}


def padded_rows() -> dict[str, torch.Tensor]:  # [24, LENGTH] each
    """The same responses as rows; labels of prompts are real and masked, those of the padding are -100."""
    batch = ragged_groups()
    rows = {
        "tokens": torch.zeros(len(batch.lengths), LENGTH, dtype=torch.int64),
        "labels": torch.full((len(batch.lengths), LENGTH), -100),
        "loss_mask": torch.zeros(len(batch.lengths), LENGTH),
        "position_ids": torch.arange(LENGTH).repeat(len(batch.lengths), 1),
    }
    for i, (ids, prompt) in enumerate(
        zip(batch.tokens.split(batch.lengths.tolist()), batch.prompt_lengths.tolist(), strict=True)
    ):
        rows["tokens"][i, : len(ids)] = ids
        rows["labels"][i, : len(ids) - 1] = ids[1:]
        rows["loss_mask"][i, prompt - 1 : len(ids) - 1] = 1.0
    return rows


def micro_batches() -> list[dict[str, torch.Tensor]]:
    """This context-parallel rank's chunks of each row: the first and last, or the middle ones."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    mine = {
        key: rows.unflatten(1, (2 * size, -1))[:, [rank, 2 * size - 1 - rank]].flatten(1)
        for key, rows in padded_rows().items()
    }
    parts = {key: rows.split(ROWS) for key, rows in mine.items()}
    return [{key: part[i] for key, part in parts.items()} for i in range(len(parts["tokens"]))]


def foreign_loop(wrapped: list, folder: HfFolder) -> dict[str, Any]:
    def forward_step(iterator, chunk):
        batch = next(iterator)
        output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        def loss_func(losses):
            ignored = losses[batch["labels"] < 0].detach()
            assert losses.shape == batch["labels"].shape and losses.dtype == torch.float32 and not ignored.any()
            loss, num_tokens = (losses * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int()
            return loss, num_tokens, {"loss": loss.detach(), "num_tokens": num_tokens}

        return output, loss_func

    config = wrapped[0].config
    config.finalize_model_grads_func = finalize_model_grads
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    batches = micro_batches()
    iterators = [iter(batches) for _ in wrapped]
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(wrapped) > 1 else iterators[0],
        model=wrapped if len(wrapped) > 1 else wrapped[0],
        num_microbatches=len(batches),
        seq_length=LENGTH,
        micro_batch_size=ROWS,
        forward_only=False,
    )
    sums = torch.zeros(2, dtype=torch.float64)
    if is_last_stage():
        sums += torch.tensor([[float(r["loss"]), float(r["num_tokens"])] for r in reports], dtype=torch.float64).sum(0)
    dist.all_reduce(sums, group=parallel_state.get_context_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(sums, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    loss, num_tokens = sums.tolist()
    return {"loss": loss / num_tokens, "num_tokens": int(num_tokens), "gradients": whole_gradients(wrapped, folder)}


@torch.no_grad()
def compare_losses(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Per-token losses [b, s] of one micro-batch: Megatron's own, ours in its place, and Megatron's after `remove`."""
    batch = micro_batches()[0]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        return {}

    def losses():
        return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).clone()

    result = {"labels": batch["labels"], "before": losses()}
    for name, hyper in {"sft": {}, "eaft": {"entropy_power": 0.0}, "dft": {}}.items():
        hook = hook_loss(model, name, **hyper)
        result[name] = losses()
        hook.remove()
    hook.remove()  # once more: nothing happens
    result["after"] = losses()
    return result


def refused(model: torch.nn.Module, folder: HfFolder, parallel: ParallelConfig) -> dict[str, str]:
    hook = hook_loss(model, "dft")
    messages = {"twice": message_of(lambda: hook_loss(model, "sft"))}
    hook.remove()
    messages["no language model"] = message_of(lambda: hook_loss(torch.nn.Linear(2, 2), "dft"))
    messages["vocab_size"] = message_of(lambda: hook_loss(model, "dft", vocab_size=VOCAB + 1))
    model.config.mtp_num_layers = 1
    messages["mtp"] = message_of(lambda: hook_loss(model, "dft"))
    model.config.mtp_num_layers = None
    assert "compute_language_model_loss" not in vars(model)
    return messages


def gathered(model: torch.nn.Module) -> str:
    """Whole vocabularies on each tensor-parallel rank."""
    hook = hook_loss(model, "dft")
    batch = micro_batches()[0]
    message = message_of(
        lambda: model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], runtime_gather_output=True)
    )
    hook.remove()
    return message


def message_of(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "not refused"


@contextlib.contextmanager
def without_the_process_group() -> Iterator[None]:
    """Each rank takes its shard for the whole vocabulary."""
    upstream = hooks.vocab_parallel_log_probs
    hooks.vocab_parallel_log_probs = lambda logits, labels, *, tp_group, vocab_size, **rest: upstream(
        logits, labels % logits.shape[-1], **rest
    )
    try:
        yield
    finally:
        hooks.vocab_parallel_log_probs = upstream


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    init_num_microbatches_calculator(int(os.environ["RANK"]), None, 1, 1, 1)

    def run(name: str) -> None:
        result = run_layout(name, HfFolder(arguments.model))
        if dist.get_rank() == dist.get_world_size() - 1:  # the last stage has the metrics
            torch.save(result, arguments.out / f"{name}.pt")

    run_in_worlds(by_num_ranks(arguments.layouts, str), run, arguments.out)


if __name__ == "__main__":
    main()
