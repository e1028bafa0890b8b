"""Weights of a Megatron checkpoint, without its optimizer: a converted one, or one that a training run has saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.core import dist_checkpointing, parallel_state
from torch import nn

from gft_megatron.convert.torch_dist_reader import find_checkpoint
from gft_megatron.training.checkpoint import FAILURES, CheckpointError, loading_warnings, reason_of
from gft_megatron.training.model import unwrapped


def load_megatron_weights(chunks: Sequence[nn.Module], path: Path) -> list[str]:
    """Fill the model, whatever layout the checkpoint was saved under; collective. Returns warnings.

    Args:
        path: the folder with the tracker, or one checkpoint in it.

    Raises:
        ValueError: there is no checkpoint of a format that Megatron's dist_checkpointing has.
        CheckpointError: a tensor is missing or of another shape, or a file is damaged.
    """
    folder = find_checkpoint(path)
    try:
        # How the saving run named its tensors: with the number of the layer, or layers stacked.
        saved = dist_checkpointing.load_content_metadata(str(folder)) or {}
        metadata = {**saved, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        state = {
            str(number): unwrapped(chunk).sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)
        }
        loaded = dist_checkpointing.load(state, str(folder))
        for number, chunk in enumerate(chunks):
            unwrapped(chunk).load_state_dict(loaded[str(number)])
    except FAILURES as error:
        raise CheckpointError(f"could not read the weights of {folder}: {reason_of(error)}") from error
    return loading_warnings()
