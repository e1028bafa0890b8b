"""Load converted checkpoints into Megatron under each layout, compare with --hf-checkpoint's way, and save from there.

    torchrun --nproc-per-node 4 convert_checkpoint_worker.py --folders DIR DIR --out DIR --layouts 2x1 1x2

Reads DIR/hf and DIR/megatron of each folder; writes OUT/LAYOUT/NAME/iter_0000003 with Megatron's dist_checkpointing.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from layouts import is_for, parallel_of, run_layouts
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from torch import nn

from gft_megatron.config import ModelConfig, ParallelConfig
from gft_megatron.convert import HfFolder
from gft_megatron.convert.torch_dist_reader import TorchDistFolder
from gft_megatron.training import model as models
from gft_megatron.training.parallel import lay_out, seed_ranks
from gft_megatron.training.weights import global_parameters, load_weights

# Newer Megatron-LM saves so: the numbers of layer and expert in the name, gate and up projection apart.
SINGLETON_LAYOUTS = ("2x2", "2x2x2")


def build(folder: HfFolder, parallel: ParallelConfig) -> tuple[nn.Module, int]:
    bf16 = folder.shape.dtype is torch.bfloat16
    settings = ModelConfig(hf_checkpoint=str(folder.path), bf16=bf16, make_vocab_size_divisible_by=64)
    config = models.transformer_config(folder.shape, settings, parallel, {})
    vocab_size = models.padded_vocab_size(folder.shape, settings, parallel)
    (model,) = models.build_chunks(
        folder.shape, config, vocab_size=vocab_size, max_sequence_length=256, device=torch.device("cpu")
    )
    return model, vocab_size


def check_list(model: nn.Module, release: Path) -> None:
    """The checkpoint has the tensors of the model, no more, in the global shapes that Megatron makes of them."""
    state = model.sharded_state_dict()
    apply_factories(state)
    own = {}
    for part in nested_values(state):
        if isinstance(part, ShardedTensor):
            own[part.key] = (part.global_shape, part.allow_shape_mismatch)
        elif isinstance(part, ShardedObject):
            own[part.unique_key] = None
    of_stages: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_stages, own)
    expected = {key: value for stage in of_stages for key, value in stage.items()}
    found = TorchDistFolder(release)
    objects = {key for key, value in expected.items() if value is None}
    assert objects <= found.objects, objects - found.objects
    assert found.tensors.keys() == expected.keys() - objects, found.tensors.keys() ^ expected.keys()
    for key in found.tensors:
        shape, other_padding = expected[key]
        first = 1 if other_padding else 0
        assert found.tensors[key].shape[first:] == tuple(shape)[first:], key


def run_layout(layout: str, paths: list[Path], out: Path) -> None:
    parallel = parallel_of(layout)
    lay_out(parallel)
    seed_ranks(1)
    for path in paths:
        folder = HfFolder(path / "hf")
        if not is_for(layout, folder.shape):
            continue
        expected, vocab_size = build(folder, parallel)
        load_weights([expected], folder, padded_vocab_size=vocab_size)
        model, _ = build(folder, parallel)
        check_list(model, path / "megatron" / "release")
        loaded = dist_checkpointing.load(model.sharded_state_dict(), str(path / "megatron" / "release"))
        assert loaded["checkpoint_version"] == 3.0
        model.load_state_dict({name: value for name, value in loaded.items() if name in model.state_dict()})
        for (name, mine), (other, theirs) in zip(global_parameters(model), global_parameters(expected), strict=True):
            assert name == other and mine.dtype is theirs.dtype, f"{path.name} {layout} {name}"
            assert torch.equal(mine, theirs), f"{path.name} {layout} {name}"
        target = out / layout / path.name / "iter_0000003"
        if dist.get_rank() == 0:
            target.mkdir(parents=True)
            (target.parent / "latest_checkpointed_iteration.txt").write_text("3")
        dist.barrier()
        metadata = {"singleton_local_shards": layout in SINGLETON_LAYOUTS}
        metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        # Keys of an optimizer are none of the model's business.
        moments = ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.x", torch.ones(4), replica_id=dist.get_rank()
        )
        dist_checkpointing.save({**model.sharded_state_dict(metadata=metadata), "moments": moments}, str(target))
    dist.barrier()
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    run_layouts(run_layout)
