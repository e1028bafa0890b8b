"""Megatron on several ranks: load a folder, compute its log-probs, push its weights; for `run_on_ranks`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from gft_megatron.config import ModelConfig, ParallelConfig
from gft_megatron.convert import HfFolder
from gft_megatron.rollout.sglang.http import Http, Keys
from gft_megatron.rollout.sglang.weight_sync import build_weight_sync
from gft_megatron.training import cpu
from gft_megatron.training import model as models
from gft_megatron.training.logits import logits_of
from gft_megatron.training.parallel import lay_out, seed_ranks
from gft_megatron.training.weights import export_hf_tensors, load_weights


@dataclass(frozen=True)
class Push:
    """One job of all ranks."""

    tp_size: int
    pp_size: int
    way: str
    weights: Path
    """Hugging Face folder."""
    version: int
    ep_size: int = 1


async def server_log_probs(http: Http, url: str, tokens: list[int]) -> Tensor:  # [tokens - 1]
    """Of tokens after the first, at temperature 1."""
    sampling = {"max_new_tokens": 1, "temperature": 1.0}
    body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    answer = await http.call(url, "/generate", body, timeout_sec=60)
    return torch.tensor([entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]])


def push_from_ranks(
    rank: int, world_size: int, pushes: list[Push], urls: tuple[str, ...], keys: Keys, tokens: list[int], out: Path
) -> None:
    """Writes OUT/VERSION.pt: what Megatron makes of the tokens, and each server after the push."""
    cpu.install()
    for push in pushes:
        parallel = ParallelConfig(
            tensor_model_parallel_size=push.tp_size,
            pipeline_model_parallel_size=push.pp_size,
            expert_model_parallel_size=push.ep_size,
        )
        lay_out(parallel)
        seed_ranks(1)
        folder = HfFolder(push.weights)
        settings = ModelConfig(hf_checkpoint=str(push.weights), make_vocab_size_divisible_by=64)
        vocab_size = models.padded_vocab_size(folder.shape, settings, parallel)
        chunks = models.build_chunks(
            folder.shape,
            models.transformer_config(folder.shape, settings, parallel, {}),
            vocab_size=vocab_size,
            max_sequence_length=len(tokens),
            device=torch.device("cpu"),
        )
        load_weights(chunks, folder, padded_vocab_size=vocab_size)
        logits = logits_of(chunks, torch.tensor([tokens]))
        found: list[object] = [None] * world_size
        dist.all_gather_object(found, None if logits is None else logits[0, :-1, : folder.shape.vocab_size])
        tensors = export_hf_tensors(chunks, folder.shape, to_rank_zero=True)
        if rank == 0:
            (megatron, *_) = [log_probs_at(part, tokens) for part in found if part is not None]
            servers = asyncio.run(_push(push, tensors, urls, keys, tokens, out))
            torch.save([megatron, *servers], out / f"{push.version}.pt")
        else:
            assert list(tensors) == []
        dist.barrier()
        parallel_state.destroy_model_parallel()


def log_probs_at(logits: Tensor, tokens: list[int]) -> Tensor:  # [tokens - 1, v] -> [tokens - 1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[1:, None])[:, 0]


async def _push(
    push: Push,
    tensors: Iterable[tuple[str, Tensor]],
    urls: tuple[str, ...],
    keys: Keys,
    tokens: list[int],
    out: Path,
) -> list[Tensor]:
    async with Http(keys) as http:
        sync = build_weight_sync(
            push.way,
            http,
            folder=out / "weights",
            source_folder=push.weights,
            dtype=torch.float32,
            device=torch.device("cpu"),
            bucket_bytes=100_000,
        )
        result = await sync.push(urls, tensors, push.version, allow_running=False)
        await sync.close()
        assert result.acknowledged == tuple(urls), result
        return [await server_log_probs(http, url, tokens) for url in urls]
