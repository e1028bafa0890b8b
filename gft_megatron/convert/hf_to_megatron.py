"""A Hugging Face folder as a Megatron checkpoint: no model is built, no process group, no Megatron.

    OUT/latest_checkpointed_iteration.txt    "release", as Megatron-LM has it
    OUT/release/                             torch_dist: any TP, PP, EP and DP loads it
    OUT/hf/                                  config.json, tokenizer, generation configuration, chat template
    OUT/gft_megatron_export.json             our files, padding and dtypes

Headers are read and checked to their end before anything is written. A worker (a thread) holds one part of a parameter
at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gft_megatron.convert.complete_folder import CompleteFolder, naming_the_disk, refuse_to_replace_what_is_not_ours
from gft_megatron.convert.conversion_plan import HF_PART, Plan, Progress, check_workers, make_plan
from gft_megatron.convert.families import Layout
from gft_megatron.convert.families.tables import dtype_kept
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.hf_writer import check_carried_files, copy_everything_but_weights
from gft_megatron.convert.layout import TensorSpec, shard
from gft_megatron.convert.lora import AdaptedTensor
from gft_megatron.convert.mapping import (
    checkpoint_places,
    extra_state_keys,
    hf_names_of,
    megatron_parameters,
    tensor_spec,
)
from gft_megatron.convert.megatron_to_hf import stored_parameters
from gft_megatron.convert.stored_tensor import StoredTensor
from gft_megatron.convert.torch_dist_reader import TRACKER
from gft_megatron.convert.torch_dist_writer import Part, write_torch_dist

Sizes = tuple[int, ...]

_LARGEST_PART = 256 * 2**20
"""Bytes of the embedding that are written at once, if the padded rows divide so."""


@dataclass(frozen=True)
class HfToMegatron:
    """The conversion of a Hugging Face folder, planned."""

    source: HfFolder
    target: Path
    parts: list[Part]
    dtype: torch.dtype | None
    workers: int
    plan: Plan

    def run(self, progress: Progress) -> None:
        """Write everything.

        Raises:
            ValueError, OSError: nothing is left behind then.
        """
        self.plan.check_disk(self.target)
        with CompleteFolder(self.target, flag="OUT") as folder:
            with naming_the_disk(folder.target):
                (folder.partial / "release").mkdir()
                (folder.partial / HF_PART).mkdir()
                (folder.partial / TRACKER).write_text("release")
                copy_everything_but_weights(self.source.path, folder.partial / HF_PART, self.dtype)
            write_torch_dist(
                folder.partial / "release",
                self.parts,
                empty_objects=extra_state_keys(self.source.shape),
                workers=self.workers,
                progress=progress,
            )
            stored_parameters(folder.partial / "release", self.source.shape)
            folder.publish(
                {
                    "model_type": self.source.shape.model_type,
                    "vocab_size": self.plan.vocab_size,
                    "padded_vocab_size": self.plan.padded_vocab_size,
                    "dtypes": self.plan.dtypes,
                    "torch": torch.__version__,
                }
            )


def plan_hf_to_megatron(
    source: Path,
    target: Path,
    *,
    tp_size: int,
    make_vocab_size_divisible_by: int,
    dtype: torch.dtype | None,
    workers: int,
    lora_adapter: Path | None = None,
) -> HfToMegatron:
    """Read and check the headers of a Hugging Face folder.

    Args:
        tp_size: how tensors are cut up, so that a rank reads no more than its own. Every other size loads too.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this times `tp_size`.
        dtype: of all weights; None: each as it is stored.
        lora_adapter: a folder in PEFT's format, merged into the weights.

    Raises:
        ValueError: the first thing wrong; one line, naming the file and the tensor.
    """
    check_workers(workers)
    refuse_to_replace_what_is_not_ours(target.resolve(), flag="OUT")
    folder = HfFolder(source, lora_adapter=lora_adapter)
    folder.check_weights()
    check_carried_files(source)
    shape = folder.shape
    shape.check_tensor_parallel_size(tp_size)
    if make_vocab_size_divisible_by < 1:
        raise ValueError(f"--make-vocab-size-divisible-by {make_vocab_size_divisible_by}: it has to be at least 1")
    multiple = make_vocab_size_divisible_by * tp_size
    padded = -(-shape.vocab_size // multiple) * multiple
    parts = [part for name in megatron_parameters(shape) for part in _parts_of(folder, name, tp_size, padded, dtype)]
    _check_one_dtype_a_key(parts)
    plan = make_plan(
        shape,
        Counter({part.key: part.dtype for part in parts}.values()),
        num_bytes=sum(part.nbytes for part in parts),
        padded=padded,
        memory=workers * 2 * max(part.nbytes for part in parts),
        target=target,
    )
    return HfToMegatron(folder, target, parts, dtype, workers, plan)


def _parts_of(
    folder: HfFolder, name: str, tp_size: int, padded_vocab_size: int, dtype: torch.dtype | None
) -> Iterator[Part]:
    """The boxes of one parameter: one for each tensor-parallel rank, of the gate and of the up projection apart."""
    spec, place = tensor_spec(folder.shape, name), checkpoint_places(folder.shape, name)[0]
    stored = [folder.stored[hf_name] for hf_name in hf_names_of(folder.shape, name)]
    found = {part.dtype for part in stored}
    if dtype is None and len(found) > 1:
        names = ", ".join(hf_names_of(folder.shape, name))
        raise ValueError(f"{stored[0].path}: {names} make one parameter but have several dtypes; choose with --dtype")
    written = dtype_kept(hf_names_of(folder.shape, name)[0], dtype or found.pop())
    # Experts are cut for one expert-tensor-parallel rank: they are small, and there are many.
    parts, whole = _by_rank(spec, stored, 1 if spec.is_expert else tp_size, padded_vocab_size)
    for offsets, sizes, read in parts:
        yield Part(
            key=place.key,
            shape=(*place.axes, *whole),
            offsets=(*place.index, *offsets),
            sizes=(*(1 for _ in place.axes), *sizes),
            dtype=written,
            make=partial(_read_as, read, written),
        )


def _by_rank(
    spec: TensorSpec, stored: list[StoredTensor | AdaptedTensor], tp_size: int, padded_vocab_size: int
) -> tuple[list[tuple[Sizes, Sizes, Callable[[], Tensor]]], Sizes]:
    """(Offsets, sizes, reader) of each rank's box, and the shape of the whole parameter."""
    rows, *columns = spec.part_shapes[0]
    if spec.layout is Layout.REPLICATED:
        return [((0,) * (1 + len(columns)), (rows, *columns), lambda: stored[0][:])], (rows, *columns)
    if spec.layout is Layout.GATED:  # megatron/core/transformer/mlp.py, apply_swiglu_sharded_factory
        boxes = []
        for number, part in enumerate(stored):
            one = TensorSpec(Layout.COLUMN, (part.shape,), spec.num_query_groups)
            own, _ = _by_rank(one, [part], tp_size, padded_vocab_size)
            boxes += [((number * rows + offsets[0], *offsets[1:]), sizes, read) for offsets, sizes, read in own]
        return boxes, (len(stored) * rows, *columns)
    whole = [sum(shape[0] for shape in spec.part_shapes), *columns]
    axis, num_boxes = 0, tp_size
    if spec.layout is Layout.ROW:
        axis = 1
    elif spec.layout is Layout.VOCAB:
        whole[0] = padded_vocab_size
        num_bytes = padded_vocab_size * columns[0] * stored[0].dtype.itemsize
        while num_bytes / num_boxes > _LARGEST_PART and padded_vocab_size % (2 * num_boxes) == 0:
            num_boxes *= 2
    sizes = tuple(size // num_boxes if at == axis else size for at, size in enumerate(whole))
    return [
        (
            tuple(rank * sizes[axis] if at == axis else 0 for at in range(len(whole))),
            sizes,
            partial(shard, stored, spec, rank, num_boxes, padded_vocab_size),
        )
        for rank in range(num_boxes)
    ], tuple(whole)


def _read_as(read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return read().to(dtype).contiguous()


def _check_one_dtype_a_key(parts: list[Part]) -> None:
    dtypes: dict[str, torch.dtype] = {}
    for part in parts:
        if dtypes.setdefault(part.key, part.dtype) is not part.dtype:
            raise ValueError(
                f"{part.key} is {dtypes[part.key]} in one layer and {part.dtype} in another, "
                "a Megatron checkpoint has one for all; choose with --dtype"
            )
