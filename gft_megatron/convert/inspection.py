"""What a folder holds, in lines for people; only headers are read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.megatron_to_hf import is_optimizer_state
from gft_megatron.convert.stored_tensor import StoredTensor
from gft_megatron.convert.torch_dist_reader import GlobalTensor, TorchDistFolder, find_checkpoint


def describe(path: Path, *, with_tensors: bool) -> Iterator[str]:
    """A line for each fact, then for each tensor of the model.

    Raises:
        ValueError: neither a Hugging Face folder nor a Megatron checkpoint, or a damaged one.
    """
    if (path / "config.json").is_file():
        yield from _describe_hf(path, with_tensors)
    else:
        yield from _describe_megatron(find_checkpoint(path), with_tensors)


def _describe_hf(path: Path, with_tensors: bool) -> Iterator[str]:
    folder = HfFolder(path)
    tensors = folder.stored
    shape = folder.shape
    tied = "tied to the embedding" if shape.tie_word_embeddings else "of its own"
    yield f"Hugging Face folder {path}"
    yield f"model       {shape.model_type}: {shape.num_layers} layers, hidden {shape.hidden_size}, output layer {tied}"
    yield f"vocabulary  {shape.vocab_size}"
    yield f"weights     {_counted(tensors.values())} in {len({tensor.path for tensor in tensors.values()})} files"
    if with_tensors:
        yield from (_line(name, tensor) for name, tensor in tensors.items())


def _describe_megatron(path: Path, with_tensors: bool) -> Iterator[str]:
    folder = TorchDistFolder(path)
    model = {key: tensor for key, tensor in folder.tensors.items() if not is_optimizer_state(key)}
    rest = [tensor for key, tensor in folder.tensors.items() if key not in model]
    files = {box.path for tensor in folder.tensors.values() for box in tensor.boxes}
    yield f"Megatron checkpoint {path}, torch_dist"
    yield f"model       {_counted(model.values())}"
    yield f"optimizer   {_counted(rest)}"
    yield f"other       {len(folder.objects)} objects that are no tensors"
    yield f"files       {len(files)}, {sum(file.stat().st_size for file in files if file.is_file()):,} bytes"
    if with_tensors:
        yield from (_line(key, tensor) for key, tensor in sorted(model.items()))


def _counted(tensors: Iterable[StoredTensor | GlobalTensor]) -> str:
    tensors = list(tensors)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    words = [f"{count} in {dtype}" for dtype, count in dtypes.items()]
    elements = sum(math.prod(tensor.shape) for tensor in tensors)
    size = sum(tensor.nbytes for tensor in tensors)
    return f"{len(tensors)} tensors ({', '.join(words) or 'none'}), {elements:,} elements, {size:,} bytes"


def _line(name: str, tensor: StoredTensor | GlobalTensor) -> str:
    return f"{name}\t{str(tensor.dtype).removeprefix('torch.')}\t{list(tensor.shape)}"
