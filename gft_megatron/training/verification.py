"""Hold the Megatron model of a checkpoint against the transformers model that it was converted from: their logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from gft_megatron.config import ModelConfig, ParallelConfig
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.megatron_weights import MegatronWeights
from gft_megatron.training.exchange import all_or_none
from gft_megatron.training.logits import logits_of
from gft_megatron.training.model import build_chunks, padded_vocab_size, transformer_config
from gft_megatron.training.weights import load_weights

_SEED = 20260421  # prompts are the same each time


@dataclass(frozen=True)
class LogitsCompared:
    """Logits of the same tokens: Megatron's against those of transformers, both computed in one dtype."""

    num_positions: int
    largest_difference: float
    """Infinite where one of the two is no finite number."""
    worst: tuple[int, int, int]
    """Prompt, position and token id of the largest difference."""
    same_top1: float
    """Share of positions at which both prefer the same token."""


def compare_logits(
    folder: HfFolder,
    checkpoint: Path,
    parallel: ParallelConfig,
    device: torch.device,
    *,
    bf16: bool,
    num_prompts: int,
    prompt_length: int,
    make_vocab_size_divisible_by: int,
) -> LogitsCompared:
    """The comparison, on every rank; collective over the world.

    The transformers model is held whole by one rank, the first of the last pipeline stage.

    Args:
        parallel: sequence parallelism is added where the model needs it.
        bf16: compute in bfloat16; else in float32.
        num_prompts: of random tokens, the same ones each time.
        prompt_length: tokens of a prompt.

    Raises:
        ValueError, OSError: on some rank; FailedElsewhere on the others.
    """
    prompt_length = min(prompt_length, folder.shape.max_position_embeddings)
    tp_size = parallel.tensor_model_parallel_size
    if tp_size > 1 and (folder.shape.moe or folder.shape.mla):  # see require_divisible in model.py
        parallel = replace(parallel, sequence_parallel=True)
        if prompt_length % tp_size:
            raise ValueError(
                f"--prompt-length {prompt_length}: of this model it has to be a multiple of "
                f"--tensor-model-parallel-size {tp_size}"
            )
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(folder.shape.vocab_size, (num_prompts, prompt_length), generator=generator)

    def load() -> list[nn.Module]:
        settings = ModelConfig(
            hf_checkpoint=str(folder.path), bf16=bf16, make_vocab_size_divisible_by=make_vocab_size_divisible_by
        )
        config = transformer_config(folder.shape, settings, parallel, {})
        vocab_size = padded_vocab_size(folder.shape, settings, parallel)
        chunks = build_chunks(
            folder.shape, config, vocab_size=vocab_size, max_sequence_length=prompt_length, device=device
        )
        load_weights(chunks, MegatronWeights(checkpoint, folder.shape), padded_vocab_size=vocab_size)
        return [chunk.eval() for chunk in chunks]

    logits = logits_of(all_or_none(load), tokens)

    def compare() -> LogitsCompared | None:
        # Every replica has logits, and all tensor-parallel ranks of its last stage.
        leads = parallel_state.get_data_parallel_rank() == parallel_state.get_tensor_model_parallel_rank() == 0
        if logits is None or not leads:
            return None
        expected = transformers_logits(folder, tokens.to(device), torch.bfloat16 if bf16 else torch.float32)
        return compared(logits[..., : folder.shape.vocab_size], expected)

    reports: list[LogitsCompared | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, all_or_none(compare))
    (report,) = [report for report in reports if report is not None]
    return report


def transformers_logits(folder: HfFolder, tokens: Tensor, dtype: torch.dtype) -> Tensor:  # [b, s] -> [b, s, v]
    """What transformers makes of the same tokens, computed in `dtype` on their device."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder.path, dtype=dtype, attn_implementation="eager", local_files_only=True, trust_remote_code=False,
        use_safetensors=True,
    )  # fmt: skip
    with torch.no_grad():
        return model.to(tokens.device).eval()(tokens, use_cache=False).logits


def compared(found: Tensor, expected: Tensor) -> LogitsCompared:  # [b, s, v] each
    """Compare logits."""
    difference = (found.double() - expected.double()).abs()
    difference.masked_fill_(difference.isnan(), torch.inf)
    worst = int(difference.argmax())
    place = [int(index) for index in torch.unravel_index(torch.tensor(worst), difference.shape)]
    return LogitsCompared(
        num_positions=expected[..., 0].numel(),
        largest_difference=float(difference.flatten()[worst]),
        worst=(place[0], place[1], place[2]),
        same_top1=float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
    )
