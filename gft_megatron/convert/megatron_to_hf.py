"""A Megatron checkpoint as a Hugging Face folder: of `hf_to_megatron`, or of a training run under any layout.

Lists and headers are read and checked to their end before anything is written. A worker (a thread) holds one parameter
at a time.
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from gft_megatron.convert.complete_folder import refuse_to_replace_what_is_not_ours
from gft_megatron.convert.conversion_plan import HF_PART, Plan, Progress, check_workers, make_plan
from gft_megatron.convert.families import Layout
from gft_megatron.convert.families.tables import KEPT_IN_FLOAT32, dtype_kept
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.hf_writer import HfFolderWriter, check_carried_files, plan_files
from gft_megatron.convert.mapping import (
    checkpoint_places,
    expected_hf_shapes,
    hf_names_of,
    megatron_parameters,
    merge_to_hf,
    tensor_spec,
)
from gft_megatron.convert.model_shape import ModelShape
from gft_megatron.convert.torch_dist_reader import StoredParameter, TorchDistFolder, find_checkpoint

_OPTIMIZER = ("optimizer.", "chained_")
"""How the keys of a training checkpoint begin that are no weights."""


@dataclass(frozen=True)
class MegatronToHf:
    """The conversion of a Megatron checkpoint, planned."""

    config_folder: Path
    target: Path
    shape: ModelShape
    parameters: dict[str, StoredParameter]
    dtypes: dict[str, torch.dtype]
    """Of each Hugging Face tensor."""
    max_shard_bytes: int
    workers: int
    plan: Plan

    def run(self, progress: Progress) -> None:
        """Write everything.

        Raises:
            ValueError, OSError: nothing is left behind then.
        """
        self.plan.check_disk(self.target)
        of_the_model = {dtype for name, dtype in self.dtypes.items() if not name.endswith(KEPT_IN_FLOAT32)}
        with HfFolderWriter(
            self.target,
            source_folder=self.config_folder,
            dtype=self.dtypes if len(of_the_model) > 1 else next(iter(of_the_model)),
            max_shard_bytes=self.max_shard_bytes,
            flag="OUT",
        ) as writer:
            own = threading.local()
            stop = threading.Event()
            largest = max(parameter.nbytes for parameter in self.parameters.values())

            def convert(name: str) -> None:
                if stop.is_set():
                    return
                try:
                    if not hasattr(own, "memory"):
                        own.memory = torch.empty(largest, dtype=torch.uint8)
                    whole = self.parameters[name].read(own.memory)
                    for hf_name, tensor in merge_to_hf(self.shape, name, [whole]):
                        writer.add(hf_name, tensor)
                        progress(tensor.numel() * self.dtypes[hf_name].itemsize)
                except BaseException:
                    stop.set()
                    raise

            with ThreadPoolExecutor(self.workers) as pool:
                running = [pool.submit(convert, name) for name in self.parameters]
                try:
                    for future in running:
                        future.result()
                except BaseException:  # an interrupt too
                    stop.set()
                    raise
            writer.publish()


def plan_megatron_to_hf(
    source: Path,
    target: Path,
    *,
    config_folder: Path | None,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    workers: int,
) -> MegatronToHf:
    """Read and check the lists of a Megatron checkpoint: what this module wrote, or what a training run saved.

    Args:
        source: the folder with the tracker, or one checkpoint in it.
        config_folder: a Hugging Face folder with the model's config.json and tokenizer; None: the one in `source`.
        dtype: of all weights; None: each as it is stored.

    Raises:
        ValueError: the first thing wrong; one line, naming the file and the tensor.
    """
    check_workers(workers)
    if max_shard_bytes < 1:
        raise ValueError(f"--max-shard-bytes {max_shard_bytes}: it has to be at least 1")
    refuse_to_replace_what_is_not_ours(target.resolve(), flag="OUT")
    checkpoint = find_checkpoint(source)
    if config_folder is None:
        config_folder = checkpoint.parent / HF_PART
        if not (config_folder / "config.json").is_file():
            raise ValueError(f"{checkpoint} has no {config_folder / 'config.json'}; give --hf-checkpoint")
    shape = HfFolder(config_folder).shape
    check_carried_files(config_folder)
    parameters = stored_parameters(checkpoint, shape)
    dtypes = {
        hf_name: dtype_kept(hf_name, dtype or parameter.dtype)
        for name, parameter in parameters.items()
        for hf_name in hf_names_of(shape, name)
    }
    hf_plan = plan_files(expected_hf_shapes(shape), dtypes, max_shard_bytes)
    places = {name: hf_plan.tensors[hf_names_of(shape, name)[0]] for name in parameters}
    in_order = sorted(parameters, key=lambda name: (places[name].path, places[name].offset))
    plan = make_plan(
        shape,
        Counter(dtypes.values()),
        num_bytes=hf_plan.num_bytes,
        padded=parameters[megatron_parameters(shape)[0]].shape[0],
        memory=workers * 2 * max(parameter.nbytes for parameter in parameters.values()),
        target=target,
    )
    ordered = {name: parameters[name] for name in in_order}
    return MegatronToHf(config_folder, target, shape, ordered, dtypes, max_shard_bytes, workers, plan)


def is_optimizer_state(key: str) -> bool:
    """Whether a tensor of a training checkpoint is none of the model's weights."""
    return key.startswith(_OPTIMIZER)


def stored_parameters(checkpoint: Path, shape: ModelShape) -> dict[str, StoredParameter]:
    """Every parameter of the model, found and checked.

    Raises:
        ValueError: as `plan_megatron_to_hf`.
    """
    folder = TorchDistFolder(checkpoint)
    used: set[str] = set()
    found = {name: _find(folder, shape, name, used) for name in megatron_parameters(shape)}
    for key in folder.tensors.keys() - used:
        if not is_optimizer_state(key):
            raise ValueError(f"{checkpoint} holds tensor {key!r}, which a {shape.model_type} model does not have")
    return found


def _find(folder: TorchDistFolder, shape: ModelShape, name: str, used: set[str]) -> StoredParameter:
    """The parameter, whichever way the checkpoint has it: stacked, numbered, or with the gate apart."""
    places, spec = checkpoint_places(shape, name), tensor_spec(shape, name)
    place = next((place for place in places if place.key in folder.tensors), places[-1])
    keys: tuple[str, ...] = (place.key,)
    if spec.layout is Layout.GATED and place.key + "_w" in folder.tensors:
        keys = (place.key + "_w", place.key + "_v")
    rows = sum(part[0] for part in spec.part_shapes) // len(keys)
    expected = (*place.axes, rows, *spec.part_shapes[0][1:])
    halves = []
    for key in keys:
        tensor = folder.tensors.get(key)
        if tensor is None:
            names = " or ".join(repr(place.key) for place in places)
            raise ValueError(f"{folder.path}: no tensor {names}")
        is_padded = spec.layout is Layout.VOCAB and tensor.shape[:1] > expected[:1]
        if tensor.shape != expected and not (is_padded and tensor.shape[1:] == expected[1:]):
            raise ValueError(
                f"{folder.path}: tensor {key!r} has shape {list(tensor.shape)}, config.json makes it {list(expected)}"
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{folder.path}: tensor {key!r} has {tensor.dtype}, expected float32, bfloat16 or float16")
        halves.append(folder.parameter(key, place.index))
        used.add(key)
    return halves[0] if len(halves) == 1 else _stacked(halves)


def _stacked(halves: list[StoredParameter]) -> StoredParameter:
    pieces = []
    rows = 0
    for half in halves:
        pieces += [piece.moved_down(rows) for piece in half.pieces]
        rows += half.shape[0]
    return StoredParameter(halves[0].dtype, (rows, *halves[0].shape[1:]), tuple(pieces))
