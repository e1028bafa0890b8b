"""Compare the weights of a Hugging Face folder with those of a Megatron checkpoint, one parameter at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gft_megatron.convert.conversion_plan import Progress
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.mapping import merge_to_hf
from gft_megatron.convert.megatron_to_hf import stored_parameters
from gft_megatron.convert.torch_dist_reader import StoredParameter


@dataclass(frozen=True)
class WeightsCompared:
    """Hugging Face tensors, each converted to the checkpoint's dtype, against the checkpoint's."""

    num_tensors: int
    num_different: int
    """Tensors that are not bitwise the same."""
    worst: str | None
    """Name of the tensor with the largest difference; None where all are the same."""
    largest_difference: float


class WeightsToCompare:
    """Both sides opened, their lists checked."""

    def __init__(self, folder: HfFolder, checkpoint: Path) -> None:
        """
        Args:
            checkpoint: what `find_checkpoint` found.

        Raises:
            ValueError: either of them is not whole, or not of this model; one line, naming the file and the tensor.
        """
        folder.check_weights()
        self._folder = folder
        self._parameters: dict[str, StoredParameter] = stored_parameters(checkpoint, folder.shape)
        self.num_bytes = sum(tensor.nbytes for tensor in folder.stored.values())
        """Of the Hugging Face folder."""

    def compare(self, progress: Progress) -> WeightsCompared:
        """Read all of it.

        Raises:
            ValueError, OSError: a file cannot be read.
        """
        num_tensors = 0
        different: dict[str, float] = {}
        memory = torch.empty(max(parameter.nbytes for parameter in self._parameters.values()), dtype=torch.uint8)
        for name, parameter in self._parameters.items():
            for hf_name, found in merge_to_hf(self._folder.shape, name, [parameter.read(memory)]):
                stored = self._folder.tensor(hf_name)
                progress(stored.nbytes)
                num_tensors += 1
                expected = stored.to(found.dtype)
                if not _same_bits(expected, found):
                    different[hf_name] = _largest_difference(expected, found)
        worst = max(different, key=different.__getitem__, default=None)
        return WeightsCompared(num_tensors, len(different), worst, different[worst] if worst else 0.0)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32}[one.itemsize]  # a NaN is no other than itself
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


def _largest_difference(one: Tensor, other: Tensor) -> float:
    """Infinite where only one of them is NaN; 0 for zeros of different sign."""
    difference = (one.double() - other.double()).abs()
    difference[one.isnan() & other.isnan() | (one == other)] = 0.0
    return float(difference.masked_fill_(difference.isnan(), torch.inf).max())
