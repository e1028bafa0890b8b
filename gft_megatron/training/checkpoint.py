"""Checkpoints: complete or absent, and a resume that never starts at step 0 by accident.

    ROOT/latest_checkpointed_iteration.txt    Megatron's tracker, replaced by rename
    ROOT/iter_0000050/                        megatron dist_checkpointing: model and optimizer, resharded on load
        run_state.json                        step, data position, counters, schedule
        random_state/rank_00000.safetensors   random state of each rank; restored when the layout is the same
    ROOT/iter_0000060.partial/                a save that was cut off; removed by the next one

A folder gets its final name only after every rank has written its part.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from gft_megatron.durable import sync
from gft_megatron.training.model import gather_updated_parameters, unwrapped

TRACKER = "latest_checkpointed_iteration.txt"
_FOLDER = re.compile(r"iter_(\d{7})")

# A full disk or a damaged file can fail in any way inside dist_checkpointing; what a writer met reaches every rank as
# torch's CheckpointException, which is no Exception.
_FAILURES = (Exception, CheckpointException)


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message names the file and says what to do."""


def save_checkpoint(
    root: Path,
    iteration: int,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    run_state: dict[str, Any],
    *,
    keep_last: int,
) -> Path:
    """Write everything a resume needs; collective. Keeps the newest `keep_last` folders.

    Args:
        run_state: what JSON can hold.

    Raises:
        CheckpointError: a rank could not write. Earlier checkpoints are untouched.
    """
    final = _folder(root, iteration)
    partial = final.with_name(final.name + ".partial")
    try:
        if dist.get_rank() == 0:
            root.mkdir(parents=True, exist_ok=True)
            for stale in root.glob("iter_*.partial"):
                shutil.rmtree(stale, ignore_errors=stale != partial)
            partial.mkdir()
        dist.barrier()
        gather_updated_parameters(chunks)
        state, metadata = _sharded_state(chunks, optimizer, is_loading=False)
        dist_checkpointing.save(state, str(partial), content_metadata=metadata)
        _random_state_file(partial).parent.mkdir(exist_ok=True)
        save_file(_random_state(), _random_state_file(partial))
        sync(_random_state_file(partial))
        if dist.get_rank() == 0:
            content = {"iteration": iteration, "scheduler": scheduler.state_dict(), **run_state}
            (partial / "run_state.json").write_text(json.dumps(content, indent=1))
        dist.barrier()
        if dist.get_rank() == 0:
            _publish(partial, final, iteration)
            _remove_old(root, keep=keep_last, newest=iteration)
        dist.barrier()
    except _FAILURES as error:
        free = shutil.disk_usage(root if root.exists() else root.parent).free
        raise CheckpointError(
            f"could not write the checkpoint {final}: {_reason(error)}; {free / 2**20:.0f} MiB are free there; "
            f"earlier checkpoints are untouched"
        ) from error
    return final


def find_checkpoint(root: Path) -> tuple[Path | None, str | None]:
    """The checkpoint to resume from (None: there has never been one) and a warning, if the tracker was of no use.

    Raises:
        CheckpointError: something was saved here, but nothing complete is left.
    """
    complete = sorted(folder for folder in root.glob("iter_*") if _is_complete(folder))
    tracker = root / TRACKER
    if not tracker.exists():
        if not complete:
            return None, None
        return complete[-1], f"{tracker} is missing; resuming from the newest complete folder {complete[-1].name}"
    text = tracker.read_text(errors="replace").strip()
    if text.isascii() and text.isdigit() and _folder(root, int(text)) in complete:
        return _folder(root, int(text)), None
    if not complete:
        raise CheckpointError(
            f"{tracker} says {text[:40]!r}, but {root} holds no complete checkpoint: "
            f"restore one, or remove the file to start from the beginning"
        )
    warning = f"{tracker} says {text[:40]!r}, which is no complete checkpoint; resuming from {complete[-1].name}"
    return complete[-1], warning


def oldest_checkpoint(root: Path) -> int:
    """Iteration of the oldest complete checkpoint, 0 where there is none: a resume may go back to it."""
    return min(
        (int(folder.name.removeprefix("iter_")) for folder in root.glob("iter_*") if _is_complete(folder)), default=0
    )


def load_checkpoint(
    folder: Path,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
) -> tuple[dict[str, Any], list[str]]:
    """Restore model, optimizer and random state; collective. Returns the run state, the schedule's in it, and warnings.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    warnings = []
    version = importlib.metadata.version("megatron-core")
    if Version(version) < Version("0.17.1"):
        warnings.append(
            f"megatron-core {version} unpickles what it finds in a checkpoint (CVE-2026-65180, fixed in 0.17.1): "
            f"load only checkpoints that you wrote yourself"
        )
    try:
        run_state = json.loads((folder / "run_state.json").read_text())
        state, _ = _sharded_state(chunks, optimizer, is_loading=True)
        loaded = dist_checkpointing.load(state, str(folder))
        for key, chunk in _named_chunks(chunks):
            unwrapped(chunk).load_state_dict(loaded[key])
        optimizer.load_state_dict(loaded["optimizer"])
    except _FAILURES as error:
        raise CheckpointError(f"could not read the checkpoint {folder}: {_reason(error)}") from error
    if run_state.get("layout") == layout() and _random_state_file(folder).exists():
        _set_random_state(load_file(_random_state_file(folder)))
    else:
        warnings.append("the parallel layout has changed: random states start anew from --seed")
    return run_state, warnings


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        # Some ranks hear only that another one failed.
        error, _ = next(iter(error.failures.values()), (OSError("a file could not be written"), None))
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def layout() -> dict[str, int]:
    """The parallel layout that random states belong to."""
    sizes = {
        "world": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
    }
    experts = {
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert tensor": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    # A checkpoint from before there were experts has no sizes of theirs.
    return sizes | {name: size for name, size in experts.items() if size > 1}


def _named_chunks(chunks: list[DistributedDataParallel]) -> list[tuple[str, DistributedDataParallel]]:
    if len(chunks) == 1:
        return [("model", chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def _sharded_state(
    chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, *, is_loading: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    # "fully_reshardable": a checkpoint of the distributed optimizer loads under any other layout.
    content = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    metadata = {**content, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {key: unwrapped(chunk).sharded_state_dict(metadata=metadata) for key, chunk in _named_chunks(chunks)}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state, content


def _random_state() -> dict[str, torch.Tensor]:
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return states


def _set_random_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "tracker."
    get_cuda_rng_tracker().set_states(
        {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    )


def _random_state_file(folder: Path) -> Path:
    return folder / "random_state" / f"rank_{dist.get_rank():05d}.safetensors"


def _folder(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def _is_complete(folder: Path) -> bool:
    # The name alone says so; the files are looked for in case somebody copied a folder and was cut off.
    return (
        _FOLDER.fullmatch(folder.name) is not None
        and (folder / "metadata.json").is_file()
        and (folder / "run_state.json").is_file()
    )


def _publish(partial: Path, final: Path, iteration: int) -> None:
    """Give a folder its name once the disk has its files, and the tracker its number once the disk has that name:
    groups are forgotten, and earlier checkpoints removed, on the strength of it."""
    for path in (*filter(Path.is_file, partial.iterdir()), partial / "random_state", partial):
        sync(path)
    if final.exists():  # an older run of the same steps, overtaken after a resume from before it
        _discard(final)
    os.rename(partial, final)
    sync(final.parent)
    new = final.with_name(TRACKER + ".new")
    new.write_text(str(iteration))
    sync(new)
    os.replace(new, final.with_name(TRACKER))
    sync(final.parent)


def _remove_old(root: Path, *, keep: int, newest: int) -> None:
    numbers = sorted(int(match[1]) for folder in root.iterdir() if (match := _FOLDER.fullmatch(folder.name)))
    for number in [number for number in numbers if number <= newest][:-keep]:
        _discard(_folder(root, number))


def _discard(folder: Path) -> None:
    """Not complete any more from the first moment; what cannot be removed now is left to the next save."""
    stale = folder.with_name(folder.name + ".old.partial")
    os.rename(folder, stale)
    shutil.rmtree(stale, ignore_errors=True)
