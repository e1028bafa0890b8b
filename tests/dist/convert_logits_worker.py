"""Load Hugging Face folders into Megatron under each layout, compute logits, export again; started by torchrun.

    torchrun --nproc-per-node 2 convert_logits_worker.py --folders DIR DIR --out DIR --layouts 2x1 1x2

Reads DIR/tokens.pt of each folder; writes OUT/LAYOUT/<folder name>/logits.pt and the exported folder hf beside it.
Layouts are named as in layouts.py.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # Inductor takes minutes for the routers of all these models

import torch
import torch.distributed as dist
from layouts import is_for, parallel_of, run_layouts
from megatron.core import parallel_state

from gft_megatron.config import ModelConfig
from gft_megatron.convert import HfFolder
from gft_megatron.training import model as models
from gft_megatron.training.logits import logits_of
from gft_megatron.training.parallel import lay_out, seed_ranks
from gft_megatron.training.weights import export_hf_folder, load_weights


def run_layout(layout: str, paths: list[Path], out: Path) -> None:
    """Write the logits and the exported folder of every model to OUT/LAYOUT/NAME."""
    parallel = parallel_of(layout)
    lay_out(parallel)
    seed_ranks(1)
    for path in paths:
        folder = HfFolder(path)
        if not is_for(layout, folder.shape):
            continue
        settings = ModelConfig(hf_checkpoint=str(path), make_vocab_size_divisible_by=64)
        config = models.transformer_config(folder.shape, settings, parallel, {})
        vocab_size = models.padded_vocab_size(folder.shape, settings, parallel)
        tokens = torch.load(path / "tokens.pt", weights_only=True)
        chunks = models.build_chunks(
            folder.shape, config, vocab_size=vocab_size, max_sequence_length=256, device=torch.device("cpu")
        )
        load_weights(chunks, folder, padded_vocab_size=vocab_size)
        written = out / layout / path.name
        logits = logits_of(chunks, tokens)
        is_first_replica = parallel_state.get_data_parallel_rank() == 0
        if logits is not None and is_first_replica and parallel_state.get_tensor_model_parallel_rank() == 0:
            written.mkdir(parents=True)
            torch.save(logits, written / "logits.pt")
        dist.barrier()
        export_hf_folder(chunks, folder, written / "hf")
    dist.barrier()
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    run_layouts(run_layout)
