"""Weights of a Megatron checkpoint, a rank's shard at a time: a converted one, or one that a training run has saved.

Nothing in the checkpoint is unpickled or run, unlike in Megatron's own loader.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from gft_megatron.convert.layout import shard_of_whole
from gft_megatron.convert.mapping import parameter_name, tensor_spec
from gft_megatron.convert.megatron_to_hf import stored_parameters
from gft_megatron.convert.model_shape import ModelShape
from gft_megatron.convert.torch_dist_reader import find_checkpoint


class MegatronWeights:
    """The model's part of a torch_dist checkpoint of any layout; an optimizer's is not looked at."""

    def __init__(self, path: Path, shape: ModelShape) -> None:
        """Find and check every parameter.

        Args:
            path: the folder with the tracker, or one checkpoint in it.

        Raises:
            ValueError: there is no checkpoint, or not a whole one of this model; one line, naming file and tensor.
        """
        self.shape = shape
        self._parameters = stored_parameters(find_checkpoint(path), shape)

    def load_shard(self, name: str, *, tp_rank: int, tp_size: int, padded_vocab_size: int) -> Tensor:
        """As `HfFolder.load_shard`, of a layout that divides the model."""
        spec = tensor_spec(self.shape, name)
        whole = self._parameters[parameter_name(self.shape, name)]
        return shard_of_whole(whole, spec, tp_rank, tp_size, padded_vocab_size)
