"""What a rank does before it knows its run: imported once, by the process that forked_ranks.py forks ranks from."""

import os

from gft_megatron.training.process import prepare_process

os.environ["OMP_NUM_THREADS"] = "1"
prepare_process()

from gft_megatron.training import cpu  # noqa: E402

cpu.install()

import transformers.models.qwen2.modeling_qwen2  # noqa: E402, F401

from gft_megatron.training import loop, main  # noqa: E402

__all__ = ["loop", "main"]
