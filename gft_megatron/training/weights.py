"""Weights between Hugging Face tensors and the model chunks of all ranks: read a folder, yield whole tensors.

The names and layouts are in convert/; here are only the process groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.hf_writer import write_hf_folder
from gft_megatron.convert.mapping import EXPERT_NUMBER, LAYER_NUMBER, merge_to_hf, tensor_spec
from gft_megatron.convert.megatron_weights import MegatronWeights
from gft_megatron.convert.model_shape import ModelShape
from gft_megatron.training.exchange import on_rank_zero
from gft_megatron.training.model import gather_updated_parameters, unwrapped


def load_weights(chunks: Sequence[nn.Module], source: HfFolder | MegatronWeights, *, padded_vocab_size: int) -> None:
    """Read this rank's shard of every parameter.

    Raises:
        ValueError: a tensor is missing or misshapen, or a file is damaged; the message names it.
    """
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in global_parameters(chunk):
                group = _tensor_group(is_expert=tensor_spec(source.shape, name).is_expert)
                shard = source.load_shard(
                    name, tp_rank=group.rank(), tp_size=group.size(), padded_vocab_size=padded_vocab_size
                )
                parameter.copy_(shard)


def global_parameters(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and buffers that a checkpoint has, under the names they have in the whole model: a stage counts its
    layers from 0, a rank its experts."""
    model = unwrapped(chunk)
    rank = parallel_state.get_expert_model_parallel_rank()
    first_expert = rank * _num_local_experts(model.config.num_moe_experts or 0)
    for name, parameter in (*model.named_parameters(), *_expert_biases(model)):
        layer, expert = LAYER_NUMBER.search(name), EXPERT_NUMBER.search(name)
        if expert is not None:
            name = EXPERT_NUMBER.sub(str(first_expert + int(expert.group())), name)
        if layer is not None:
            name = LAYER_NUMBER.sub(str(model.decoder.layers[int(layer.group())].layer_number - 1), name)
        yield name, parameter


def export_hf_tensors(
    chunks: Sequence[nn.Module], shape: ModelShape, *, to_rank_zero: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of every weight, one parameter at a time; collective over the world.

    Every rank has to consume the iterator to its end, and to have read a tensor before it asks for the next: it may be
    a live weight.

    Args:
        to_rank_zero: rank 0 gets the tensors, the others an iterator that yields nothing. Rank 0 holds one parameter
            beside the model, the other ranks at most that. Otherwise every rank gets every tensor.
    """
    gather_updated_parameters(chunks)
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    mine = {name: parameter.detach() for chunk in chunks for name, parameter in global_parameters(chunk)}
    places = [
        _Place(name, tuple(parameter.shape), parameter.dtype, pipeline_group.rank(), expert_rank)
        for own_name, parameter in mine.items()
        for expert_rank, name in _on_all_expert_ranks(own_name, _num_local_experts(shape.num_moe_experts))
    ]
    stages: list[list[_Place]] = [places] * pipeline_group.size()
    if pipeline_group.size() > 1:
        dist.all_gather_object(stages, places, group=pipeline_group)
    for place in (place for stage in stages for place in stage):
        if to_rank_zero and not _is_in_first_replica(place):
            continue
        own = mine.get(place.name)
        own = None if own is None else own.contiguous()
        spec = tensor_spec(shape, place.name)
        num_shards = _tensor_group(is_expert=place.expert_rank is not None).size() if spec.is_sharded else 1
        shards = _within_stage(own, place, num_shards, to_rank_zero=to_rank_zero)
        shards = _between_stages(shards, place, num_shards, to_rank_zero=to_rank_zero)
        if shards is not None and not (to_rank_zero and dist.get_rank() > 0):
            yield from merge_to_hf(shape, place.name, list(shards))
        del own, shards  # before the next is gathered


@dataclass(frozen=True)
class _Place:
    """Where a parameter is."""

    name: str
    shard_shape: tuple[int, ...]
    dtype: torch.dtype
    stage: int
    expert_rank: int | None
    """Expert-parallel rank that has it; None: every one has."""

    def empty(self, num_shards: int) -> Tensor:
        return torch.empty((num_shards, *self.shard_shape), dtype=self.dtype, device=torch.cuda.current_device())


def _is_in_first_replica(place: _Place) -> bool:
    """Whether this rank is of the first ranks of each stage that hold this parameter, all of it."""
    if place.expert_rank is None:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    return parallel_state.get_expert_data_parallel_rank() == 0


def _within_stage(own: Tensor | None, place: _Place, num_shards: int, *, to_rank_zero: bool) -> Tensor | None:
    """All shards [shards, ...] on every rank of the replica's stage, or on its first only; None elsewhere.

    Args:
        own: this rank's shard; None where it has none.
    """
    if parallel_state.get_pipeline_model_parallel_rank() != place.stage:
        return None
    if place.expert_rank is not None and parallel_state.get_expert_model_parallel_world_size() > 1:
        # Ranks of this group: expert-tensor-parallel rank first, then expert-parallel rank.
        group = parallel_state.get_expert_tensor_and_model_parallel_group()
        shards = place.empty(num_shards)
        first = place.expert_rank * parallel_state.get_expert_tensor_parallel_world_size()
        for i, shard in enumerate(shards):
            if group.rank() == first + i:
                assert own is not None
                shard.copy_(own)
            dist.broadcast(shard, src=dist.get_global_rank(group, first + i), group=group)
        return shards
    assert own is not None
    if num_shards == 1:
        return own[None]
    group = _tensor_group(is_expert=place.expert_rank is not None)
    if not to_rank_zero:
        shards = place.empty(num_shards)
        dist.all_gather_into_tensor(shards, own[None], group=group)
        return shards
    shards = place.empty(num_shards) if group.rank() == 0 else None
    dist.gather(own, None if shards is None else list(shards), dst=dist.get_global_rank(group, 0), group=group)
    return shards


def _between_stages(shards: Tensor | None, place: _Place, num_shards: int, *, to_rank_zero: bool) -> Tensor | None:
    """From the stage that has the shards to all, or from its first rank to rank 0."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return shards
    src = dist.get_global_rank(group, place.stage)
    if not to_rank_zero:
        shards = place.empty(num_shards) if shards is None else shards.contiguous()
        dist.broadcast(shards, src=src, group=group)
        return shards
    first = dist.get_global_rank(group, 0)
    if first != 0 or place.stage == 0 or dist.get_rank() not in (0, src):
        return shards
    if dist.get_rank() == 0:
        shards = place.empty(num_shards)
        dist.recv(shards, src=src, group=group)
        return shards
    assert shards is not None
    dist.send(shards.contiguous(), dst=0, group=group)
    return None


def _tensor_group(*, is_expert: bool) -> dist.ProcessGroup:
    """The ranks that share a parameter."""
    if is_expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _on_all_expert_ranks(name: str, num_local_experts: int) -> Iterator[tuple[int | None, str]]:
    """(expert-parallel rank, name) of what the ranks have in the place of this rank's parameter `name`."""
    number = EXPERT_NUMBER.search(name)
    if number is None:
        yield None, name
        return
    for rank in range(parallel_state.get_expert_model_parallel_world_size()):
        expert = rank * num_local_experts + int(number.group()) % num_local_experts
        yield rank, EXPERT_NUMBER.sub(str(expert), name)


def _num_local_experts(num_experts: int) -> int:
    """Rank r of an expert-parallel group has the r-th run of so many."""
    return num_experts // parallel_state.get_expert_model_parallel_world_size()


def _expert_biases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Not trained, but part of the model: buffers that a router keeps in float32 whatever the model is in."""
    for name, module in model.named_modules():
        if isinstance(module, TopKRouter) and module.expert_bias is not None:
            module._maintain_float32_expert_bias()
            yield f"{name}.expert_bias", module.expert_bias


def export_hf_folder(chunks: Sequence[nn.Module], source: HfFolder, target: Path) -> None:
    """Write the model as a Hugging Face folder, with the configuration and tokenizer of `source`; collective.

    Raises:
        ValueError, OSError: on every rank, what kept rank 0 from writing. No partial folder stays behind.
    """
    tensors = export_hf_tensors(chunks, source.shape, to_rank_zero=True)
    dtype = next(unwrapped(chunks[0]).parameters()).dtype

    def write() -> None:
        try:
            write_hf_folder(target, tensors, source_folder=source.path, dtype=dtype)
        finally:
            _consume(tensors)

    if dist.get_rank() != 0:
        _consume(tensors)
    on_rank_zero(write)


def _consume(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """The other ranks wait in the collectives of whatever is left."""
    for _ in tensors:
        pass
