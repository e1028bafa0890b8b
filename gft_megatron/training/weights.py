"""Weights between Hugging Face tensors and the model chunks of all ranks: read a folder, yield whole tensors.

The names and layouts are in convert/; here are only the process groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.hf_writer import write_hf_folder
from gft_megatron.convert.mapping import merge_to_hf, tensor_spec
from gft_megatron.convert.model_shape import ModelShape
from gft_megatron.training.exchange import on_rank_zero
from gft_megatron.training.model import gather_updated_parameters, unwrapped

_LOCAL_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+(?=\.)")


def load_hf_weights(chunks: Sequence[nn.Module], folder: HfFolder, *, padded_vocab_size: int) -> None:
    """Read this rank's shard of every parameter.

    Raises:
        ValueError: a tensor is missing or misshapen, or a file is damaged; the message names it.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in _global_parameters(chunk):
                shard = folder.load_shard(name, tp_rank=rank, tp_size=size, padded_vocab_size=padded_vocab_size)
                parameter.copy_(shard)


def export_hf_tensors(
    chunks: Sequence[nn.Module], shape: ModelShape, *, to_rank_zero: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of every weight, one parameter at a time; collective over the world.

    Every rank has to consume the iterator to its end, and to have read a tensor before it asks for the next: it may be
    a live weight.

    Args:
        to_rank_zero: rank 0 gets the tensors, the others an iterator that yields nothing. Rank 0 holds one parameter
            beside the model, the other ranks of its replica at most that. Otherwise every rank gets every tensor.
    """
    gather_updated_parameters(chunks)
    if to_rank_zero and parallel_state.get_data_parallel_rank(with_context_parallel=True) > 0:
        return
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    mine = {name: parameter.detach() for chunk in chunks for name, parameter in _global_parameters(chunk)}
    shapes = {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in mine.items()}
    stages: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [shapes] * pipeline_group.size()
    if pipeline_group.size() > 1:
        dist.all_gather_object(stages, shapes, group=pipeline_group)
    collect = _on_first_rank if to_rank_zero else _on_all_ranks
    for owner, names in enumerate(stages):
        for name, (shard_shape, dtype) in names.items():
            is_sharded = tensor_spec(shape, name).is_sharded and tensor_group.size() > 1
            own = mine[name].contiguous() if owner == stage else None
            # [shards, ...]
            sizes = (tensor_group.size() if is_sharded else 1, *shard_shape)
            shards = collect(own, sizes, dtype, owner=owner)
            if shards is not None:
                yield from merge_to_hf(shape, name, list(shards))
            del own, shards  # before the next is gathered


def _on_all_ranks(own: Tensor | None, sizes: tuple[int, ...], dtype: torch.dtype, *, owner: int) -> Tensor:
    """All shards of a parameter [shards, ...], on every rank of the replica.

    Args:
        own: this rank's; None but on the pipeline stage `owner`.
    """
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    if sizes[0] == pipeline_group.size() == 1:
        return own[None]
    shards = torch.empty(sizes, dtype=dtype, device=torch.cuda.current_device())
    if own is not None and sizes[0] == 1:
        shards[0] = own
    elif own is not None:
        dist.all_gather_into_tensor(shards, own[None], group=parallel_state.get_tensor_model_parallel_group())
    if pipeline_group.size() > 1:
        dist.broadcast(shards, src=dist.get_global_rank(pipeline_group, owner), group=pipeline_group)
    return shards


def _on_first_rank(own: Tensor | None, sizes: tuple[int, ...], dtype: torch.dtype, *, owner: int) -> Tensor | None:
    """The same on the first rank of the replica; None on the others."""
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    first_of_stage = parallel_state.get_tensor_model_parallel_rank() == 0
    stage = parallel_state.get_pipeline_model_parallel_rank()
    if not first_of_stage:
        if own is not None and sizes[0] > 1:
            dist.gather(own, dst=dist.get_global_rank(tensor_group, 0), group=tensor_group)
        return None
    if own is not None and sizes[0] == 1:
        shards = own[None]
    elif own is not None:
        shards = torch.empty(sizes, dtype=dtype, device=own.device)
        dist.gather(own, list(shards), dst=dist.get_global_rank(tensor_group, 0), group=tensor_group)
    elif stage == 0:
        shards = torch.empty(sizes, dtype=dtype, device=torch.cuda.current_device())
        dist.recv(shards, src=dist.get_global_rank(pipeline_group, owner), group=pipeline_group)
    else:
        return None
    if stage == 0:
        return shards
    dist.send(shards, dst=dist.get_global_rank(pipeline_group, 0), group=pipeline_group)
    return None


def _global_parameters(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under the names they have in the whole model: a stage counts its layers from 0."""
    model = unwrapped(chunk)
    for name, parameter in model.named_parameters():
        local = _LOCAL_LAYER.search(name)
        if local is not None:
            layer = model.decoder.layers[int(local.group())].layer_number - 1
            name = _LOCAL_LAYER.sub(str(layer), name)
        yield name, parameter


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
