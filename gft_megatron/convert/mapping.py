"""Names and layouts of one model: from a Megatron parameter's name to its Hugging Face tensors and back.

A name is that of a parameter of GPTModel with the layer counted over the whole model, and the expert over its layer: a
pipeline stage counts its layers from 0, an expert-parallel rank its experts, and their caller adds the offsets.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from gft_megatron.convert.families import EMBEDDING, FAMILIES, OUTPUT_LAYER, Entry, Layers
from gft_megatron.convert.layout import TensorSpec, merge
from gft_megatron.convert.model_shape import ModelShape

LAYER_NUMBER = re.compile(r"(?<=^decoder\.layers\.)\d+(?=\.)")
EXPERT_NUMBER = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)|(?<=\.experts\.linear_fc[12]\.weight)\d+$")
"""In the name of a parameter; megatron-core's SequentialMLP has the first form, its TEGroupedMLP the second."""


def hf_names_of(shape: ModelShape, name: str) -> tuple[str, ...]:
    """Hugging Face tensors that the parameter is made of, in the order that its layout wants.

    With tied embeddings the output layer (a parameter of its own on the last pipeline stage) is made of the embedding.

    Raises:
        ValueError: no table has a parameter of this name.
    """
    entry, layer, expert = _find(shape, name)
    return tuple(part.name.format(i=layer, e=expert) for part in entry.parts)


def tensor_spec(shape: ModelShape, name: str) -> TensorSpec:
    """Layout and sizes of the parameter; `.is_sharded` is False where all tensor-parallel ranks hold the same.

    Raises:
        ValueError: no table has a parameter of this name.
    """
    entry, _, _ = _find(shape, name)
    return _spec(shape, entry)


def merge_to_hf(shape: ModelShape, name: str, shards: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of each tensor in this parameter, without padding; may be views of the shards.

    The output layer of a model with tied embeddings yields nothing: the embedding has been or will be yielded.

    Args:
        shards: of all tensor-parallel ranks, in order; one is enough where `tensor_spec(...).is_sharded` is False.

    Raises:
        ValueError: no table has a parameter of this name.
    """
    hf_names, spec = hf_names_of(shape, name), tensor_spec(shape, name)
    if name == OUTPUT_LAYER and shape.tie_word_embeddings:
        return
    parts = merge(shards, spec)
    for hf_name, expected in zip(hf_names, spec.part_shapes, strict=True):
        whole = next(parts)
        assert whole.shape == expected, f"{name}: shards merge to {hf_name} {tuple(whole.shape)}, expected {expected}"
        yield hf_name, whole
        del whole  # before the next is made


def expected_hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in this model's Hugging Face folder."""
    return {
        part.name.format(i=layer, e=expert): sizes
        for entry, layer, expert in _parameters(shape)
        for part, sizes in zip(entry.parts, _spec(shape, entry).part_shapes, strict=True)
    }


def megatron_parameters(shape: ModelShape) -> list[str]:
    """Every parameter of the whole model, under its name with the local layer spec; of tied embeddings only the one.

    A router's bias is among them, though it is a buffer.
    """
    return [
        entry.names[0].format(i=layer, e=expert)
        for entry, layer, expert in _parameters(shape)
        if not (entry.names[0] == OUTPUT_LAYER and shape.tie_word_embeddings)
    ]


def parameter_name(shape: ModelShape, name: str) -> str:
    """The name in `megatron_parameters` of a parameter under any of its names; the embedding's for an output layer that
    is tied to it.

    Raises:
        ValueError: no table has a parameter of this name.
    """
    entry, layer, expert = _find(shape, name)
    is_tied = name == OUTPUT_LAYER and shape.tie_word_embeddings
    return EMBEDDING if is_tied else entry.names[0].format(i=layer, e=expert)


def checkpoint_places(shape: ModelShape, name: str) -> tuple[CheckpointPlace, ...]:
    """Where a torch_dist checkpoint may have the parameter; the first is where both Megatrons that we know write it.

    Raises:
        ValueError: no table has a parameter of this name.
    """
    entry, layer, expert = _find(shape, name)
    # dist_checkpointing has Transformer Engine's names, whatever the model was built of; but of experts, whatever they
    # are, SequentialMLP's with another word: sharded_state_dict in megatron/core/transformer/moe/experts.py.
    key = entry.names[0].replace(".local_experts.", ".experts.") if entry.is_expert else entry.names[-1]
    if layer is None:
        return (CheckpointPlace(key, (), ()),)
    stacked = key.replace(".{e}.", ".")
    index, axes = ((), ()) if expert is None else ((expert,), (shape.num_moe_experts,))
    numbered = CheckpointPlace(stacked.format(i=layer), index, axes)
    # What is saved with singleton_local_shards.
    all_numbered = CheckpointPlace(key.format(i=layer, e=expert), (), ())
    if not shape.has_equal_layers:
        return numbered, all_numbered
    # sharded_state_dict in megatron/core/transformer/transformer_block.py
    together = CheckpointPlace(stacked.replace(".{i}.", "."), (layer, *index), (shape.num_layers, *axes))
    return together, numbered, all_numbered


def extra_state_keys(shape: ModelShape) -> list[str]:
    """Objects beside the tensors that Megatron insists on: one for each module that may be Transformer Engine's.

    They hold nothing unless a model is trained in FP8. Which modules ask for theirs depends on the layer spec and on
    Transformer Engine's version, and nobody minds one too many.
    """
    keys: dict[str, None] = {}
    for name in megatron_parameters(shape):
        place = checkpoint_places(shape, name)[0]
        modules = [place.key.rpartition(".")[0]]
        if modules[0].endswith(".self_attention.linear_proj"):
            modules.append(modules[0].removesuffix("linear_proj") + "core_attention")
        # dist_checkpointing/mapping.py, ShardedObject.unique_key
        index, axes = (".".join(map(str, numbers)) for numbers in (place.index or (0,), place.axes or (1,)))
        keys |= dict.fromkeys(f"{module}._extra_state/shard_{index}_{axes}" for module in modules)
    return list(keys)


@dataclass(frozen=True)
class CheckpointPlace:
    """A tensor of a checkpoint; those that are alike are stacked along its first axes."""

    key: str
    index: tuple[int, ...]
    """Place along the first axes."""
    axes: tuple[int, ...]
    """Their sizes."""


def _parameters(shape: ModelShape) -> Iterator[tuple[Entry, int | None, int | None]]:
    """(Entry, layer's number, expert's number) of each parameter."""
    for layers in Layers:
        for entry in dict.fromkeys(_entries(shape, layers).values()):
            if entry.layers is layers:
                numbers = _layers(shape, layers) if "{i}" in entry.names[0] else (None,)
                experts = range(shape.num_moe_experts) if entry.is_expert else (None,)
                yield from ((entry, layer, expert) for layer in numbers for expert in experts)


def _layers(shape: ModelShape, layers: Layers) -> Iterator[int]:
    return (i for i in range(shape.num_layers) if layers in (Layers.ALL, shape.layers_like(i)))


@functools.cache
def _entries(shape: ModelShape, layers: Layers) -> dict[str, Entry]:
    """Entries of the parameters that layers of this kind have, and of those that belong to no layer."""
    (family,) = [family for family in FAMILIES if family.model_type == shape.model_type]
    entries = {
        name: entry
        for entry in family.entries
        if entry.layers in (Layers.ALL, layers)
        and all(getattr(shape, dim) for part in entry.parts for dim in part.dims)
        for name in entry.names
    }
    if shape.tie_word_embeddings:
        output_layer, embedding = entries[OUTPUT_LAYER], entries[EMBEDDING]
        entries[OUTPUT_LAYER] = Entry(output_layer.names, output_layer.layout, embedding.parts)
    return entries


def _find(shape: ModelShape, name: str) -> tuple[Entry, int | None, int | None]:
    """The entry, the layer's number and the expert's."""
    layer_match, expert_match = LAYER_NUMBER.search(name), EXPERT_NUMBER.search(name)
    layer = int(layer_match.group()) if layer_match else None
    expert = int(expert_match.group()) if expert_match else None
    assert layer is None or layer < shape.num_layers, f"{name}: the model has {shape.num_layers} layers"
    assert expert is None or expert < shape.num_moe_experts, f"{name}: a layer has {shape.num_moe_experts} experts"
    layers = Layers.ALL if layer is None else shape.layers_like(layer)
    entry = _entries(shape, layers).get(EXPERT_NUMBER.sub("{e}", LAYER_NUMBER.sub("{i}", name)))
    if entry is None:
        raise ValueError(f"the model has a parameter {name!r} that a {shape.model_type} checkpoint has no tensor for")
    return entry, layer, expert


def _spec(shape: ModelShape, entry: Entry) -> TensorSpec:
    return TensorSpec(
        entry.layout,
        tuple(tuple(getattr(shape, dim) for dim in part.dims) for part in entry.parts),
        shape.num_query_groups,
        entry.is_expert,
    )
