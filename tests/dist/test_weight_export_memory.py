"""Weights on their way to servers cost rank 0 a bucket and one parameter, and the other ranks next to nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hf_models import SIZES, save_model
from programs import load_program
from ranks import run_on_ranks
from transformers import Qwen2Config

BUCKET_BYTES = 24 << 20
SLACK = 6 << 20  # of the allocator and the collectives
# 96 MiB of weights; the largest parameter is the embedding.
LARGE = {
    **SIZES,
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
}
EMBEDDING_BYTES = LARGE["vocab_size"] * LARGE["hidden_size"] * 4


def export_on_ranks(rank: int, world_size: int, path: Path, out: Path) -> None:
    for tp_size in (2, 1):
        torch.save(peak_of_export(path, tp_size, world_size // tp_size), out / f"{tp_size}-{rank}.pt")


def peak_of_export(path: Path, tp_size: int, pp_size: int) -> int | None:
    """Bytes."""
    from megatron.core import parallel_state

    from gft_megatron.config import ModelConfig, ParallelConfig
    from gft_megatron.convert import HfFolder
    from gft_megatron.rollout.sglang.weight_sync.buckets import buckets
    from gft_megatron.training import cpu
    from gft_megatron.training import model as models
    from gft_megatron.training.parallel import lay_out, seed_ranks
    from gft_megatron.training.weights import export_hf_tensors, load_weights

    peak_memory = load_program("tools/bench/memory.py").PeakMemory
    cpu.install()
    parallel = ParallelConfig(tensor_model_parallel_size=tp_size, pipeline_model_parallel_size=pp_size)
    lay_out(parallel)
    seed_ranks(1)
    folder = HfFolder(path)
    settings = ModelConfig(hf_checkpoint=str(path))
    vocab_size = models.padded_vocab_size(folder.shape, settings, parallel)
    config = models.transformer_config(folder.shape, settings, parallel, {})
    chunks = models.build_chunks(
        folder.shape, config, vocab_size=vocab_size, max_sequence_length=64, device=torch.device("cpu")
    )
    load_weights(chunks, folder, padded_vocab_size=vocab_size)

    async def pack(max_bytes: int) -> None:
        async for _ in buckets(export_hf_tensors(chunks, folder.shape, to_rank_zero=True), max_bytes):
            pass

    dist.barrier()
    asyncio.run(pack(1))  # whatever is allocated once: connections, threads' stacks
    with peak_memory("cpu") as memory:
        asyncio.run(pack(BUCKET_BYTES))
    dist.barrier()
    parallel_state.destroy_model_parallel()
    return memory.peak_extra_bytes


@pytest.mark.slow
def test_no_rank_holds_more_than_a_bucket_and_a_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every large tensor a mapping of its own, gone when it is freed: otherwise the heap keeps some.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    path = save_model(tmp_path / "model", Qwen2Config(tie_word_embeddings=False, **LARGE))
    run_on_ranks(export_on_ranks, 2, path, tmp_path)
    for tp_size in (2, 1):
        first, other = (torch.load(tmp_path / f"{tp_size}-{rank}.pt") for rank in range(2))
        if first is None:
            pytest.skip("this system does not tell peak memory")
        print(f"TP{tp_size}: {first / 2**20:.1f} and {other / 2**20:.1f} MiB")
        # One parameter: its shards as they come, and the tensor that they are merged to.
        assert first <= BUCKET_BYTES + 2 * EMBEDDING_BYTES + SLACK
        assert other <= SLACK
